package identity

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Names in an output directory. Its files are symbolic links through dataLink, as in a volume of Kubernetes: replacing that
// link replaces all files at once, so a reader that follows it once never has a key that does not fit its certificate.
const (
	dataLink   = "..data"
	dataPrefix = "..pillion-"
)

// Save writes an identity into a directory, for FilesIn. Only this user can read it.
func Save(directory string, identity *Identity) error { return write(directory, identity, false) }

// FilesIn returns the files that Save writes.
func FilesIn(directory string) *Files {
	in := func(name string) string { return filepath.Join(directory, name) }
	return &Files{Certificate: in("cert-chain.pem"), Key: in("key.pem"), Roots: in("root-cert.pem")}
}

// write writes an identity into a directory, for programs that make connections of their own. shared makes the files
// readable for all users of the pod; otherwise only this one can read them.
func write(directory string, identity *Identity, shared bool) error {
	key, err := x509.MarshalPKCS8PrivateKey(identity.Certificate.PrivateKey)
	if err != nil {
		return err
	}
	var chain []byte
	for _, raw := range identity.Certificate.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})...)
	}
	files := map[string][]byte{
		"key.pem":        pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"cert-chain.pem": chain,
		"root-cert.pem":  identity.Roots.PEM,
	}
	removeOld(directory)
	data, err := os.MkdirTemp(directory, dataPrefix)
	if err != nil {
		return err
	}
	if err := fill(data, files, shared); err != nil {
		os.RemoveAll(data)
		return err
	}
	if err := replaceLink(filepath.Join(directory, dataLink), filepath.Base(data)); err != nil {
		os.RemoveAll(data)
		return err
	}
	for name := range files {
		if err := replaceLink(filepath.Join(directory, name), filepath.Join(dataLink, name)); err != nil {
			return err
		}
	}
	return nil
}

// fill writes files into a directory that no reader has opened.
func fill(directory string, files map[string][]byte, shared bool) error {
	directoryMode, mode := os.FileMode(0o700), os.FileMode(0o600)
	if shared {
		directoryMode, mode = 0o755, 0o644
	}
	for name, text := range files {
		path := filepath.Join(directory, name)
		if err := os.WriteFile(path, text, mode); err != nil {
			return err
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask
			return err
		}
	}
	return os.Chmod(directory, directoryMode)
}

// replaceLink makes path a symbolic link to target, in one step.
func replaceLink(path, target string) error {
	if current, err := os.Readlink(path); err == nil && current == target {
		return nil
	}
	temporary := path + ".new"
	if err := os.Remove(temporary); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.Symlink(target, temporary); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		os.Remove(temporary)
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	return nil
}

// removeOld removes what earlier writes have left, except the current files: a reader may be between two of them when they
// are replaced.
func removeOld(directory string) {
	current, _ := os.Readlink(filepath.Join(directory, dataLink))
	entries, _ := os.ReadDir(directory)
	for _, entry := range entries {
		if name := entry.Name(); strings.HasPrefix(name, dataPrefix) && name != current {
			os.RemoveAll(filepath.Join(directory, name))
		}
	}
}
