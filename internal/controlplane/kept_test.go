package controlplane

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/xds"
)

func keptIn(t testing.TB, now time.Time) *Kept {
	return &Kept{Path: filepath.Join(t.TempDir(), "kept"), Node: "sidecar~192.0.2.1~web-1.shop~shop.svc.cluster.local", Cluster: "Kubernetes",
		Now: func() time.Time { return now }}
}

func TestARestartedAgentHasTheKeptConfiguration(t *testing.T) {
	before := quietStore(t)
	takeAll(t, before, pushtest.Sidecar())
	k := keptIn(t, time.Now())
	if err := k.Save(before.LastGood()); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(k.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("error %v, mode %v", err, info.Mode())
	}
	after := newRig(t)
	if !k.Restore(after.Store, slog.New(slog.DiscardHandler)) {
		t.Fatal("not in force")
	}
	if got, want := after.inForce(), (&rig{Store: before}).inForce(); got != want {
		t.Errorf("in force:\n%s\nwant:\n%s", got, want)
	}
	if entries, err := os.ReadDir(filepath.Dir(k.Path)); err != nil || len(entries) != 1 {
		t.Errorf("files %v, error %v", entries, err)
	}
}

func TestTheFirstAnswersReplaceWhatWasKept(t *testing.T) {
	r := newRig(t)
	r.Restore([]xds.Update{
		update(xds.Clusters, cluster("gone", "gone", "1"), cluster("web", "web", "1")),
		update(xds.Endpoints, assignment("gone", "192.0.2.10"), assignment("web", "192.0.2.10")),
		update(xds.Listeners, httpListener("gone", "81", "1"), httpListener("http", "80", "1")),
		update(xds.Routes, routes("80", "web"), routes("81", "gone")),
	})
	r.want("gone=192.0.2.10 web=192.0.2.10 80→web 81→gone gone→81 http→80")
	outcome := r.Update(update(xds.Clusters, cluster("web", "web", "1")))
	for _, want := range []struct {
		t     xds.Type
		names []string
	}{{xds.Endpoints, []string{"web"}}, {xds.Listeners, nil}, {xds.Routes, []string{"80", "81"}}, {xds.Names, nil}} {
		if names, ok := outcome.Wanted[want.t]; !ok || !slices.Equal(names, want.names) {
			t.Errorf("%v: asks for %q (%v), want %q", want.t, names, ok, want.names)
		}
	}
	r.want("gone=192.0.2.10 web=192.0.2.10 80→web 81→gone gone→81 http→80")
	r.accepts(update(xds.Listeners, httpListener("http", "80", "1")))
	r.want("web=192.0.2.10 80→web http→80")
}

func TestSecretsAreNotKept(t *testing.T) {
	secret := Resource{Type: xds.Secrets, Name: "kubernetes://cert", TypeURL: xds.Secrets.URL(), Bytes: func() ([]byte, error) { return []byte("key"), nil }}
	k := keptIn(t, time.Now())
	if err := k.Save(slices.Values([]Resource{secret})); err != nil {
		t.Fatal(err)
	}
	if updates, _, err := k.Load(); err != nil || len(updates) != 0 {
		t.Errorf("loaded %v, error %v", updates, err)
	}
	fields := join(text(keptType, xds.Secrets.URL()), text(keptName, "kubernetes://cert"), text(keptValue, "key"))
	if _, err := parseKept(nest(fields, keptResources)); err == nil {
		t.Error("a file with secrets is accepted")
	}
}

// saved returns a file with one cluster and a file's content.
func saved(t testing.TB) (*Kept, []byte) {
	t.Helper()
	k := keptIn(t, time.Unix(2_000_000, 0))
	r := cluster("web", "web", "1")
	resource := Resource{Type: xds.Clusters, Name: r.Name, Bytes: func() ([]byte, error) { return r.Value, nil }}
	if err := k.Save(slices.Values([]Resource{resource})); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(k.Path)
	if err != nil {
		t.Fatal(err)
	}
	return k, content
}

// signed returns content with a valid checksum.
func signed(content string) []byte {
	sum := sha256.Sum256([]byte(content))
	return append([]byte(content), sum[:]...)
}

func TestAFileThatCannotBeTrustedIsIgnoredByName(t *testing.T) {
	header := fmt.Sprintf(`{"node":%q,"cluster":"Kubernetes","saved":"1970-01-24T03:33:20Z","size":10}`, keptIn(t, time.Time{}).Node)
	rewrite := func(content []byte) func(*Kept) {
		return func(k *Kept) {
			if err := os.WriteFile(k.Path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	_, good := saved(t)
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	for _, test := range []struct {
		name, want string
		spoil      func(*Kept)
	}{
		{"empty", "truncated", rewrite(nil)},
		{"cut", "checksum", rewrite(good[:len(good)-1])},
		{"a flipped bit", "checksum", rewrite(flipped)},
		{"another format", "another format", rewrite(signed("pillion kept resources 2\n" + header))},
		{"a malformed header", "its header", rewrite(signed(keptMagic + "{\n"))},
		{"not compressed", "unpacking", rewrite(signed(keptMagic + header + "\n\xff\xff\xff"))},
		{"more resources than the limit", "bytes of resources", rewrite(signed(keptMagic + strings.Replace(header, ":10}", ":1000000000}", 1) + "\n"))},
		{"another node", "another node", func(k *Kept) { k.Node = "sidecar~192.0.2.2~pay-1.shop~shop.svc.cluster.local" }},
		{"another cluster", "another cluster", func(k *Kept) { k.Cluster = "east" }},
		{"too old", "more than 24h", func(k *Kept) {
			k.Now = func() time.Time { return time.Unix(2_000_000, 0).Add(24*time.Hour + time.Second) }
		}},
		{"from the future", "from the future", func(k *Kept) { k.Now = func() time.Time { return time.Unix(2_000_000, 0).Add(-time.Hour) } }},
		{"readable by others", "mode 0640", func(k *Kept) { os.Chmod(k.Path, 0o640) }},
		{"too large", "more than", func(k *Kept) { os.Truncate(k.Path, maxKeptFile+1) }},
		{"a symbolic link", "symbolic link", func(k *Kept) { os.Rename(k.Path, k.Path+"2"); os.Symlink(k.Path+"2", k.Path) }},
		{"a directory", "not a regular file", func(k *Kept) { os.Remove(k.Path); os.Mkdir(k.Path, 0o700) }},
		{"a FIFO", "not a regular file", func(k *Kept) { os.Remove(k.Path); syscall.Mkfifo(k.Path, 0o600) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			k, _ := saved(t)
			test.spoil(k)
			updates, _, err := k.Load()
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), k.Path) || updates != nil {
				t.Errorf("error %v, want %s in %s", err, test.want, k.Path)
			}
		})
	}
}

func TestAFileOfAnotherUserIsIgnored(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root can give a file away")
		return
	}
	k, _ := saved(t)
	if err := os.Chown(k.Path, 12345, -1); err != nil {
		t.Log("this user namespace has one user:", err)
		return
	}
	if _, _, err := k.Load(); err == nil || !strings.Contains(err.Error(), "another user") {
		t.Error(err)
	}
}

func TestWithoutAFileThereIsNoConfiguration(t *testing.T) {
	k := keptIn(t, time.Now())
	if _, _, err := k.Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	r := newRig(t)
	if k.Restore(r.Store, r.config.Log) || r.log.String() != "" {
		t.Errorf("restored, or logged %s", r.log.String())
	}
}

// A crash while the file is written leaves a temporary file, or a part of it.
func TestACrashWhileWritingLeavesTheOldFile(t *testing.T) {
	k, content := saved(t)
	if err := os.WriteFile(k.Path+".new", content[:len(content)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := k.Load(); err != nil {
		t.Error(err)
	}
	if err := k.Save(slices.Values([]Resource{})); err != nil {
		t.Error(err)
	}
	if updates, _, err := k.Load(); err != nil || len(updates) != 0 {
		t.Errorf("loaded %v, error %v", updates, err)
	}
}

func TestWhatCannotBeWrittenLeavesNothing(t *testing.T) {
	k := keptIn(t, time.Now())
	if err := os.Mkdir(k.Path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := k.Save(slices.Values([]Resource{})); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(k.Path + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// saving saves the store's resources until stop is called.
func saving(t *testing.T, k *Kept, s *Store) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { k.Run(ctx, s, slog.New(slog.DiscardHandler)); close(done) }()
	return func() { cancel(); <-done }
}

func TestManyPushesAreSavedOnceAMinute(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := quietStore(t)
		takeAll(t, s, pushtest.Sidecar())
		s.Update(update(xds.Clusters, cluster("web", "web", "")))
		s.Update(update(xds.Endpoints, assignment("web", "198.51.100.1")))
		<-s.Changes()
		k := &Kept{Path: filepath.Join(dir, "kept")}
		stop := saving(t, k, s)
		start := time.Now()
		var writes []time.Duration
		var last time.Time
		for i := range 150 {
			s.Update(update(xds.Clusters, cluster("web", "web", fmt.Sprint(i))))
			time.Sleep(time.Second)
			synctest.Wait()
			if _, at, err := k.Load(); err == nil && !at.Equal(last) {
				last = at
				writes = append(writes, time.Since(start))
			}
		}
		stop()
		if want := []time.Duration{2 * time.Second, 62 * time.Second, 122 * time.Second}; !slices.Equal(writes, want) {
			t.Errorf("written after %v, want %v", writes, want)
		}
		updates, _, err := k.Load()
		last149 := func(r xds.Resource) bool { return bytes.Equal(r.Value, cluster("web", "web", "149").Value) }
		if err != nil || !slices.ContainsFunc(updates, func(u xds.Update) bool { return slices.ContainsFunc(u.Resources, last149) }) {
			t.Errorf("the last version was not written at the end: %v, error %v", updates, err)
		}
	})
}

func TestTheFirstPushIsSavedWhenItIsWhole(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := quietStore(t)
		k := &Kept{Path: filepath.Join(dir, "kept")}
		stop := saving(t, k, s)
		push := pushtest.Sidecar()
		takeAll(t, s, push[:1])
		time.Sleep(2 * keptInterval)
		stop()
		if _, _, err := k.Load(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a part was saved, error %v", err)
		}
		stop = saving(t, k, s)
		takeAll(t, s, push[1:])
		time.Sleep(2*keptSettle + time.Second)
		if !k.Restore(quietStore(t), slog.New(slog.DiscardHandler)) {
			t.Error("the whole push was not saved soon")
		}
		stop()
	})
}

// A part of a push is not saved over a whole configuration, unless it stays a part.
func TestALaterPushIsSavedWhenItIsWhole(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := quietStore(t)
		takeAll(t, s, pushtest.Sidecar())
		k := &Kept{Path: filepath.Join(dir, "kept")}
		stop := saving(t, k, s)
		start := time.Now()
		saved := func() time.Duration {
			_, at, err := k.Load()
			if err != nil {
				t.Fatal(err)
			}
			return at.Sub(start)
		}
		time.Sleep(2 * keptInterval)
		first := saved()
		s.Update(update(xds.Clusters, cluster("web", "web", "1")))
		time.Sleep(4 * keptSettle)
		if got := saved(); got != first {
			t.Errorf("a cluster without its endpoints was saved after %v", got)
		}
		s.Update(update(xds.Endpoints, assignment("web", "198.51.100.1")))
		time.Sleep(2 * keptSettle)
		whole := saved()
		if whole == first {
			t.Error("the whole push was not saved soon")
		}
		time.Sleep(2 * keptInterval)
		s.Update(update(xds.Clusters, cluster("other", "other", "1")))
		time.Sleep(warmingTimeout + 2*keptSettle)
		if saved() == whole {
			t.Error("a push that does not become whole was never saved")
		}
		stop()
	})
}

func TestAConfigurationIsAsOldAsTheLastContact(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		before := quietStore(t)
		var connected atomic.Bool
		takeAll(t, before, pushtest.Sidecar())
		k := &Kept{Path: filepath.Join(dir, "kept"), Current: connected.Load}
		if err := k.Save(before.LastGood()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		age := func() time.Duration {
			_, at, err := k.Load()
			if err != nil {
				t.Fatal(err)
			}
			return at.Sub(start)
		}
		s := quietStore(t)
		if !k.Restore(s, slog.New(slog.DiscardHandler)) {
			t.Fatal("not restored")
		}
		stop := saving(t, k, s)
		time.Sleep(20*time.Hour + time.Minute)
		if got := age(); got != 0 {
			t.Errorf("without the control plane it is from %v", got)
		}
		connected.Store(true)
		time.Sleep(time.Hour)
		if got := age(); got != 21*time.Hour {
			t.Errorf("with the control plane it is from %v", got)
		}
		stop()
	})
}

func FuzzKept(f *testing.F) {
	k, good := saved(f)
	f.Add(good)
	f.Add([]byte(keptMagic))
	f.Fuzz(func(t *testing.T, content []byte) {
		for _, content := range [][]byte{content, signed(string(content))} {
			if updates, _, err := k.parse(content); err == nil {
				quietStore(t).Restore(updates)
			}
		}
	})
}

func BenchmarkRestartWithThousandServices(b *testing.B) {
	before := quietStore(b)
	takeAll(b, before, pushtest.Thousand())
	k := keptIn(b, time.Now())
	if err := k.Save(before.LastGood()); err != nil {
		b.Fatal(err)
	}
	info, err := os.Stat(k.Path)
	if err != nil {
		b.Fatal(err)
	}
	start := processorTime(b)
	defer func() { reportProcessorTime(b, start) }()
	for b.Loop() {
		if s := quietStore(b); !k.Restore(s, slog.New(slog.DiscardHandler)) {
			b.Fatal("not in force")
		}
	}
	b.ReportMetric(float64(info.Size())/1e3, "file-KB")
}
