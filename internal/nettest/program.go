package nettest

import (
	"os"
	"syscall"
	"testing"
)

// WriteProgram writes a program or script that the test executes. Meanwhile no child process is forked: a child has a copy of
// the file's descriptor until it executes its own program, and the kernel refuses to execute a file that is open for writing
// (ETXTBSY).
func WriteProgram(t testing.TB, path, content string) {
	t.Helper()
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, []byte(content), 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
}
