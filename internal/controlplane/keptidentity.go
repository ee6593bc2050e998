package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/pillion-proxy/pillion/internal/identity"
)

// keptIdentity is a CA whose certificates are kept in a directory, so that a restarted agent has one while the CA is away.
// The directory must be in memory, because it has the key.
type keptIdentity struct {
	*identity.CA
	directory string
	log       *slog.Logger
	begun     bool
}

// Fetch returns the identity in the directory first, if it is this workload's and still valid. Then it calls the CA.
func (k *keptIdentity) Fetch(ctx context.Context) (*identity.Identity, error) {
	if !k.begun {
		k.begun = true
		kept, err := k.read(ctx)
		if err == nil && kept != nil {
			k.log.Info("kept workload certificate in use", "expires", kept.NotAfter())
			return kept, nil
		}
		if err != nil {
			k.log.Warn("kept workload certificate ignored", "err", err)
		}
	}
	return k.CA.Fetch(ctx)
}

// read returns the identity in the directory, or nil without one.
func (k *keptIdentity) read(ctx context.Context) (*identity.Identity, error) {
	files := identity.FilesIn(k.directory)
	if _, err := os.Stat(files.Certificate); os.IsNotExist(err) {
		return nil, nil
	}
	kept, err := files.Fetch(ctx)
	if err == nil && kept.SPIFFE != k.CA.SPIFFE {
		err = fmt.Errorf("it is that of %s", kept.SPIFFE)
	}
	return kept, err
}

// save keeps an identity.
func (k *keptIdentity) save(current *identity.Identity) {
	err := os.MkdirAll(k.directory, 0o700)
	if err == nil {
		err = identity.Save(k.directory, current)
	}
	if err != nil {
		k.log.Warn("workload certificate not kept for a restart", "directory", filepath.Clean(k.directory), "err", err)
	}
}
