package identity

import (
	"fmt"
	"log/slog"
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

// A file of lists that goes, is damaged or grows too large ends the trust in the lists before it: they may lack a certificate that
// was revoked since. Each change of the error is logged once.
func TestListsInAFileThatCannotBeUsedAreAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root")
		path := filepath.Join(t.TempDir(), "crl.pem")
		var log lockedBuilder
		f := FileSecrets{Log: slog.New(slog.NewTextHandler(&log, nil))}
		list := root.revoke(t, nil)
		logged := 0
		for _, step := range []struct{ name, text, want string }{
			{"no file at first", "", "no such file"},
			{"a list", list, ""},
			{"a damaged file", list[:len(list)/2], "no revocation list"},
			{"the list again", list, ""},
			{"an empty file", "\n", "no revocation list"},
			{"a changed list", root.revoke(t, nil, root.certificate), ""},
			{"no file", "", "no such file"},
			{"a large list", strings.Repeat("x\n", maxFile) + list, ""},
			{"a list that is too large", strings.Repeat("x\n", maxLists/2) + list, "more than 8388608 bytes"},
			{"the last list", list, ""},
		} {
			err := os.WriteFile(path, []byte(step.text), 0o600)
			if step.text == "" {
				os.Remove(path)
				err = nil
			}
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(filePoll)
			if step.want != "" {
				logged++
			}
			for range 2 {
				lists, err := f.Revocations(path)
				if (err != nil) != (step.want != "") || (lists == nil) != (err != nil) || err != nil && !strings.Contains(err.Error(), step.want) {
					t.Errorf("%s: lists %v, error %v", step.name, lists != nil, err)
				}
				time.Sleep(filePoll)
			}
			if n := strings.Count(log.String(), "level=ERROR"); n != logged {
				t.Errorf("%s: %d errors in the log, want %d", step.name, n, logged)
			}
		}
	})
}

// A damaged file of lists is not read at each handshake, since clients decide how many these are.
func TestADamagedFileOfListsIsReadAgainLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "crl.pem")
		write := func(text string) {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("x")
		var f FileSecrets
		_, first := f.Revocations(path)
		write(newAuthority(t, "root").revoke(t, nil))
		if _, err := f.Revocations(path); err == nil || err != first {
			t.Errorf("error %v, before %v", err, first)
		}
		time.Sleep(filePoll)
		if _, err := f.Revocations(path); err != nil {
			t.Error(err)
		}
	})
}

// All lists in files have a bound in common. Lists that are not used any more make room.
func TestListsInFilesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		directory := t.TempDir()
		text := strings.Repeat("x\n", maxLists/6) + newAuthority(t, "root").revoke(t, nil)
		var f FileSecrets
		use := func(name string) error {
			path := filepath.Join(directory, name)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := f.Revocations(path)
			return err
		}
		for _, name := range []string{"a", "b"} {
			if err := use(name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := use("c"); err == nil {
			t.Error("three lists of a third each, and more, fit")
		}
		time.Sleep(filePoll)
		if err := use("a"); err != nil {
			t.Errorf("a list that is read again: %v", err)
		}
		time.Sleep(idleLists)
		if err := use("c"); err != nil {
			t.Errorf("a list after an idle one: %v", err)
		}
	})
}

// An error of files whose content is kept is logged, once.
func TestAnErrorOfKeptFilesIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "root-cert.pem")
		if err := os.WriteFile(path, []byte(text(newAuthority(t, "a").certificate)), 0o600); err != nil {
			t.Fatal(err)
		}
		var log lockedBuilder
		f := FileSecrets{Log: slog.New(slog.NewTextHandler(&log, nil))}
		for range 3 {
			if _, err := f.Roots("file-root:" + path); err != nil {
				t.Fatal(err)
			}
			os.Remove(path)
			time.Sleep(filePoll)
		}
		if n := strings.Count(log.String(), "no such file"); n != 1 || !strings.Contains(log.String(), "kept=true") || !strings.Contains(log.String(), path) {
			t.Errorf("%d errors in the log:\n%s", n, log.String())
		}
	})
}
