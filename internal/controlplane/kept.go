package controlplane

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
	"github.com/pillion-proxy/pillion/internal/xds"
)

const (
	defaultKeptAge = 24 * time.Hour
	keptSettle     = 2 * time.Second // from a change to writing: a push is several updates
	keptInterval   = time.Minute     // between two writes, at least
	keptRenewal    = time.Hour       // between two writes of the same configuration
	clockTolerance = time.Minute     // by which a file may be from the future
	maxKeptFile    = 32 << 20
	maxKept        = defaultMaxBytes + 16<<20 // bytes of resources with their names
)

// Kept is a file with the last good resources, for an agent that is restarted while the control plane is away. The file is
// compressed, and readable by its owner only.
//
// The file is read like a response of the control plane: Store.Restore compiles and judges each resource.
// Secrets of the control plane are left out, because they have private keys; they are asked for again.
type Kept struct {
	Path string

	// Node and Cluster are of whom the resources are. A file with others is not used.
	Node, Cluster string

	MaxAge time.Duration    // of the file; 0: 24 h
	Now    func() time.Time // nil: time.Now

	// Current reports whether the control plane is connected, so that a configuration that has not changed is the current
	// one: Run renews the file each hour. nil: it is not renewed.
	Current func() bool
}

// keptMagic begins a file. The number is the version of the format.
const keptMagic = "pillion kept resources 1\n"

// keptHeader is the second line of a file, as JSON. The resources follow as deflated protobuf, and a SHA-256 hash of
// everything before it.
type keptHeader struct {
	Node    string    `json:"node"`
	Cluster string    `json:"cluster"`
	Saved   time.Time `json:"saved"`
	Size    int       `json:"size"` // of the resources, unpacked
}

// Field numbers of a resource in the file. The file is a message whose field 1 are the resources.
const (
	keptResources = 1

	keptType, keptName, keptValue = 1, 2, 3
)

// Save writes resources. A file that is there is replaced when the new one is complete.
func (k *Kept) Save(resources Resources) error {
	var packed bytes.Buffer
	packer, err := flate.NewWriter(&packed, flate.BestSpeed)
	if err != nil {
		return fmt.Errorf("keeping resources: %w", err)
	}
	header := keptHeader{Node: k.Node, Cluster: k.Cluster, Saved: k.now().UTC().Truncate(time.Second)}
	var fields, message []byte // of the resource before
	for r := range resources {
		if r.Type == xds.Secrets {
			continue
		}
		value, err := r.Bytes()
		if err != nil {
			return fmt.Errorf("keeping %v %s: %w", r.Type, r.Name, err)
		}
		fields = wire.AppendString(wire.AppendString(fields[:0], keptType, r.Type.URL()), keptName, r.Name)
		fields = wire.AppendBytes(fields, keptValue, value)
		message = wire.AppendBytes(message[:0], keptResources, fields)
		header.Size += len(message)
		packer.Write(message) // a bytes.Buffer does not fail
	}
	packer.Close()
	line, err := json.Marshal(header)
	if err != nil {
		return fmt.Errorf("keeping resources: %w", err)
	}
	file := slices.Concat([]byte(keptMagic), line, []byte("\n"), packed.Bytes())
	sum := sha256.Sum256(file)
	return writePrivate(k.Path, append(file, sum[:]...))
}

// Load returns the resources in the file, for Store.Restore, and when they were written. The error wraps fs.ErrNotExist
// if there is no file. Any other error is a reason not to use the file.
func (k *Kept) Load() (updates []xds.Update, saved time.Time, err error) {
	content, err := readPrivate(k.Path, maxKeptFile)
	if err != nil {
		return nil, time.Time{}, err
	}
	updates, saved, err = k.parse(content)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("kept resources in %s: %w", k.Path, err)
	}
	return updates, saved, nil
}

func (k *Kept) parse(content []byte) ([]xds.Update, time.Time, error) {
	if len(content) < sha256.Size {
		return nil, time.Time{}, errors.New("truncated")
	}
	content, sum := content[:len(content)-sha256.Size], content[len(content)-sha256.Size:]
	rest, ok := bytes.CutPrefix(content, []byte(keptMagic))
	if !ok {
		return nil, time.Time{}, errors.New("of another format")
	}
	if sha256.Sum256(content) != [sha256.Size]byte(sum) {
		return nil, time.Time{}, errors.New("its checksum is wrong")
	}
	line, packed, _ := bytes.Cut(rest, []byte("\n"))
	var header keptHeader
	if err := json.Unmarshal(line, &header); err != nil {
		return nil, time.Time{}, fmt.Errorf("its header: %w", err)
	}
	if err := k.check(&header); err != nil {
		return nil, time.Time{}, err
	}
	plain := make([]byte, header.Size)
	if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(packed)), plain); err != nil {
		return nil, time.Time{}, fmt.Errorf("unpacking: %w", err)
	}
	updates, err := parseKept(plain)
	return updates, header.Saved, err
}

// check returns why a file with a header is not to be used.
func (k *Kept) check(header *keptHeader) error {
	maxAge := k.MaxAge
	if maxAge == 0 {
		maxAge = defaultKeptAge
	}
	switch age := k.now().Sub(header.Saved); {
	case header.Node != k.Node:
		return fmt.Errorf("of another node, %.200q", header.Node)
	case header.Cluster != k.Cluster:
		return fmt.Errorf("of another cluster, %.200q", header.Cluster)
	case age > maxAge:
		return fmt.Errorf("%v old, more than %v", age.Round(time.Second), maxAge)
	case header.Size < 0 || header.Size > maxKept:
		return fmt.Errorf("%d bytes of resources, more than %d", header.Size, maxKept)
	case age < -clockTolerance:
		return fmt.Errorf("from the future, by %v", -age.Round(time.Second))
	}
	return nil
}

// parseKept returns the resources as updates, in the order of their types. They share the memory of b.
func parseKept(b []byte) ([]xds.Update, error) {
	var byType [xds.Types]xds.Update
	var err error
	m := wire.Read(b, &err)
	for m.Next() {
		t, r := parseKeptResource(m.Message())
		if err == nil && t == xds.Types {
			err = fmt.Errorf("a resource of type %.200q", r.TypeURL)
		}
		if err != nil {
			break
		}
		byType[t].Type = t
		byType[t].Resources = append(byType[t].Resources, r)
	}
	if err != nil {
		return nil, fmt.Errorf("malformed: %w", err)
	}
	return slices.DeleteFunc(byType[:], func(u xds.Update) bool { return len(u.Resources) == 0 }), nil
}

// parseKeptResource returns a resource and its type, or xds.Types for one that is not kept.
func parseKeptResource(m wire.Message) (xds.Type, xds.Resource) {
	var r xds.Resource
	for m.Next() {
		switch m.Number {
		case keptType:
			r.TypeURL = m.String()
		case keptName:
			r.Name = m.String()
		case keptValue:
			r.Value = m.Bytes()
		}
	}
	for t := range xds.Type(xds.Types) {
		if t.URL() == r.TypeURL && t != xds.Secrets {
			return t, r
		}
	}
	return xds.Types, r
}

// Run saves the resources of a store after they changed, until ctx ends. A push is saved once, and many pushes at most
// once a minute. Restored resources are not saved before the control plane has answered: they keep their age. A
// push is saved when it is whole, because a part of it may not start an agent, or when it has not become so for warmingTimeout.
func (k *Kept) Run(ctx context.Context, s *Store, log *slog.Logger) {
	timer := time.NewTimer(keptRenewal)
	defer timer.Stop()
	var last, since time.Time // since: of the first change that is not saved
	due := false
	whole := func() bool {
		return s.Whole() || s.Snapshot() != nil && time.Since(since) >= warmingTimeout
	}
	for {
		select {
		case <-s.Changes():
			if !due {
				due, since = true, time.Now()
				timer.Reset(max(keptSettle, time.Until(last.Add(keptInterval))))
			}
			continue
		case <-timer.C:
			if due && !whole() {
				timer.Reset(keptSettle)
				continue
			}
		case <-ctx.Done():
			if due && whole() {
				k.save(s, log)
			}
			return
		}
		if due || k.Current != nil && k.Current() {
			k.save(s, log)
		}
		due, last = false, time.Now()
		timer.Reset(keptRenewal)
	}
}

func (k *Kept) save(s *Store, log *slog.Logger) {
	if err := k.Save(s.LastGood()); err != nil {
		log.Warn("configuration not kept for a restart", "err", err)
	}
}

// Restore fills a store from the file, and logs what it did. It reports whether the store has a configuration then.
func (k *Kept) Restore(s *Store, log *slog.Logger) bool {
	updates, saved, err := k.Load()
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err != nil {
		log.Warn("kept configuration ignored", "err", err)
		return false
	}
	for _, r := range s.Restore(updates) {
		log.Warn("kept resource rejected", "resource", r.Name, "err", r.Reason)
	}
	log.Info("kept configuration in force until the control plane answers", "saved", saved)
	return s.Snapshot() != nil
}

func (k *Kept) now() time.Time {
	if k.Now == nil {
		return time.Now()
	}
	return k.Now()
}
