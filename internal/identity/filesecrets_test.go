package identity

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestSecretsInFilesAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newAuthority(t, "a"), newAuthority(t, "b")
		first, second := a.identity(t, time.Hour), a.identity(t, time.Hour)
		directory := t.TempDir()
		store(t, directory, first)
		path := func(name string) string { return filepath.Join(directory, name) }
		certificate, roots := "file-cert:"+path("cert-chain.pem")+"~"+path("key.pem"), "file-root:"+path("root-cert.pem")
		var f FileSecrets
		check := func(what string, wantLeaf *Identity, wantRoots *authority) {
			t.Helper()
			got, err := f.Certificate(certificate)
			if err != nil || !got.Leaf.Equal(wantLeaf.Certificate.Leaf) {
				t.Errorf("%s: error %v, or another certificate", what, err)
			}
			if got, err := f.Roots(roots); err != nil || string(got.PEM) != text(wantRoots.certificate) || got.Pool == nil {
				t.Errorf("%s: error %v, or other roots", what, err)
			}
		}
		check("at first", first, a)
		copyFile := func(name, text string) {
			if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		other := t.TempDir()
		store(t, other, second)
		read := func(name string) string {
			text, err := os.ReadFile(filepath.Join(other, name))
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
		copyFile("cert-chain.pem", read("cert-chain.pem"))
		copyFile("root-cert.pem", "x")
		check("before they are due", first, a)
		time.Sleep(filePoll)
		check("in the midst of a rotation", first, a)
		copyFile("key.pem", read("key.pem"))
		copyFile("root-cert.pem", text(b.certificate))
		time.Sleep(filePoll)
		check("after a rotation", second, b)
		same, _ := f.Certificate(certificate)
		time.Sleep(filePoll)
		if again, err := f.Certificate(certificate); err != nil || again != same {
			t.Errorf("the same files are another certificate, error %v", err)
		}
		if err := os.RemoveAll(directory); err != nil {
			t.Fatal(err)
		}
		time.Sleep(filePoll)
		check("after the files have gone", second, b)
	})
}

func TestSecretsInFilesThatCannotBeUsedAreNamed(t *testing.T) {
	directory := t.TempDir()
	a := newAuthority(t, "a")
	store(t, directory, a.identity(t, time.Hour))
	chain, key := filepath.Join(directory, "cert-chain.pem"), filepath.Join(directory, "key.pem")
	var f FileSecrets
	for name, want := range map[string]string{
		"file-cert:" + chain:                   "does not name two files",
		"file-cert:~" + key:                    "does not name two files",
		"file-cert:" + chain + "~":             "does not name two files",
		"file-root:" + chain + "~" + key:       "does not name two files",
		"file-cert:" + chain + "~" + key + "x": "no such file",
		"file-cert:" + chain + "~" + chain:     "found a certificate rather than a key",
		"file-cert:" + key + "~" + key:         "failed to find",
		"file-cert:/dev/null~" + key:           "failed to find",
		"file-cert:" + directory + "~" + key:   "is a directory",
	} {
		if _, err := f.Certificate(name); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v, want one with %q", name, err, want)
		}
	}
	for name, want := range map[string]string{
		"file-root:":               "does not name a file",
		"file-cert:" + chain:       "does not name a file",
		"file-root:" + key:         "no certificate",
		"file-root:" + chain + "x": "no such file",
	} {
		if _, err := f.Roots(name); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v, want one with %q", name, err, want)
		}
	}
	if system, err := f.Roots("file-root:system"); err != nil || system.Pool != nil {
		t.Errorf("the system's roots: %+v, error %v", system, err)
	}
	if len(f.secrets) > 0 {
		t.Errorf("%d secrets are kept of none that can be used", len(f.secrets))
	}
	for i := range maxFileSecrets + 10 {
		if _, err := f.Roots("file-root:" + strings.Repeat("/", i+1) + chain); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(f.secrets); n > maxFileSecrets {
		t.Errorf("%d secrets are kept", n)
	}
	for name, want := range map[string]bool{"file-cert:a~b": true, "file-root:a": true, "default": false, "file": false, "kubernetes://file-cert:": false} {
		if IsFileSecret(name) != want {
			t.Error(name)
		}
	}
	if shown := fmt.Sprintf("%+v %#v", &f, f.secrets); strings.Contains(shown, "PRIVATE") {
		t.Error(shown)
	}
}
