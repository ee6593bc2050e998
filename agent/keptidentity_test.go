package agent

import "testing"

func TestAnIdentityIsKeptInMemoryOnly(t *testing.T) {
	for directory, want := range map[string]string{"": "", "/proc": "", "/missing": "", "/dev/shm": "/dev/shm/pillion-identity"} {
		if got := identityDirectory(directory); got != want {
			t.Errorf("%q: %q, want %q", directory, got, want)
		}
	}
}
