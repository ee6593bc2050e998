package netns_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/netns"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// here returns the name of the calling thread's network namespace.
func here(t testing.TB) string {
	t.Helper()
	name, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// everyThread fails the test if a thread of this process is in another namespace than home.
func everyThread(t *testing.T, home string) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(links) == 0 {
		t.Fatalf("listing threads: %v, %v", links, err)
	}
	for _, link := range links {
		if name, err := os.Readlink(link); err == nil && name != home {
			t.Errorf("%s is %s, home is %s", link, name, home)
		}
	}
}

func TestDoRunsInsideAndRestoresTheThread(t *testing.T) {
	nettest.RequireRoot(t)
	home := here(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	inside := make(chan string, 100)
	var callers sync.WaitGroup
	for range cap(inside) {
		callers.Go(func() {
			if err := ns.Do(func() error {
				runtime.Gosched()
				inside <- here(t)
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	first := <-inside
	if first == home {
		t.Error("the function ran outside the namespace")
	}
	for range cap(inside) - 1 {
		if name := <-inside; name != first {
			t.Errorf("the function ran in %s and in %s", first, name)
		}
	}
	everyThread(t, home)
}

func TestDoReturnsTheFunctionsError(t *testing.T) {
	nettest.RequireRoot(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	home, failure := here(t), errors.New("inside")
	if err := ns.Do(func() error { return failure }); err != failure {
		t.Errorf("Do = %v", err)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil || !strings.Contains(err.Error(), "without returning") {
		t.Errorf("Do = %v for a function that ends its goroutine", err)
	}
	everyThread(t, home)
}

func TestAPathNamesTheNamespace(t *testing.T) {
	nettest.RequireRoot(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	again, err := netns.Open(ns.Path(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	names := make(chan string, 2)
	for _, handle := range []netns.Handle{ns, again} {
		handle.Do(func() error { names <- here(t); return nil })
		handle.Close()
	}
	if a, b := <-names, <-names; a != b {
		t.Errorf("Path leads to %s, not to %s", b, a)
	}
	if _, err := netns.Open("/proc/self/nothing"); err == nil || !strings.Contains(err.Error(), "/proc/self/nothing") {
		t.Errorf("Open of a missing path: %v", err)
	}
}
