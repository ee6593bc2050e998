package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Source is a configuration in force. It implements serve.Mesh.
type Source struct {
	log      *slog.Logger
	path     string // of the file; empty: config does not change
	config   Config // last good one
	snapshot atomic.Pointer[mesh.Snapshot]
	texts    map[string]string // of the snapshot's values; see edit

	watched []string      // files: that of path, and the certificates and keys that were named last
	seen    []os.FileInfo // their states before they were read; nil: missing
}

// New reads the file at path, or takes config if that is empty, and reads the certificates. An error begins with the path or is an Error.
func New(config Config, path string, log *slog.Logger) (*Source, error) {
	s := &Source{log: log, path: path, config: config}
	s.watched = []string{path}
	return s, s.read()
}

// Snapshot returns the configuration in force.
func (s *Source) Snapshot() *mesh.Snapshot { return s.snapshot.Load() }

// Identity returns nil: without a control plane there is no certificate of a workload.
func (s *Source) Identity() *identity.Identity { return nil }

// read reads all files and puts their configuration in force. An error changes nothing.
func (s *Source) read() error {
	err := s.readFiles()
	if err != nil && s.path != "" {
		err = fmt.Errorf("%s: %w", s.path, err)
	}
	return err
}

func (s *Source) readFiles() error {
	config := s.config
	s.seen = look(s.watched) // before they are read, so that no later change is missed
	if s.path != "" {
		file := look([]string{s.path})
		text, err := identity.ReadFile(s.path)
		if err != nil {
			return cause(err)
		}
		if config, err = Parse(string(text)); err != nil {
			return err
		}
		s.watch(&config)
		s.seen[0] = file[0]
	} else {
		if err := config.Validate(); err != nil {
			return err
		}
		s.watch(&config)
	}
	e := &edit{Edit: s.Snapshot().Edit(), before: s.texts, now: map[string]string{}}
	if err := e.add(&config); err != nil {
		return err
	}
	e.removeOthers()
	s.config, s.texts = config, e.now
	if next, changed := e.Edit.Snapshot(); changed {
		s.snapshot.Store(next)
	}
	return nil
}

// cause returns an error without the path that it names.
func cause(err error) error {
	if failed := (*os.PathError)(nil); errors.As(err, &failed) {
		return failed.Err
	}
	return err
}

// watch makes the files of a configuration those that are watched.
func (s *Source) watch(c *Config) {
	s.watched = slices.Concat([]string{s.path}, c.Certificates, c.Keys)
	s.seen = look(s.watched)
}

func look(paths []string) (states []os.FileInfo) {
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			info = nil
		}
		states = append(states, info)
	}
	return states
}

// interval is the time between looks at the files. A volume of a ConfigMap is replaced by a rename of a directory above it;
// notifications about the file do not report that.
const interval = time.Second

// Run puts files in force when they have changed, and calls changed then, until ctx ends. Files that cannot be used leave the
// configuration in force.
func (s *Source) Run(ctx context.Context, changed func()) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if slices.EqualFunc(s.seen, look(s.watched), unchanged) {
			continue
		}
		before := s.Snapshot()
		if err := s.read(); err != nil {
			s.log.Error("new configuration of the gateway rejected, keeping the one in force", "error", err)
			continue
		}
		if s.Snapshot() != before {
			s.log.Info("gateway configured", "routes", len(s.config.Routes), "certificates", len(s.config.Certificates))
			changed()
		}
	}
}

func unchanged(seen, now os.FileInfo) bool {
	if seen == nil || now == nil {
		return seen == nil && now == nil
	}
	return os.SameFile(seen, now) && seen.ModTime().Equal(now.ModTime()) && seen.Size() == now.Size()
}
