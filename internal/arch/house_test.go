package arch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/pillion-proxy/pillion/"

// room is the output of `go list` for one of the module's packages.
type room struct {
	ImportPath   string
	Dir          string
	Name         string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// path is the room's import path within the module.
func (r room) path() string { return strings.TrimPrefix(r.ImportPath, module) }

// files returns the absolute names of the room's own files, and of its tests.
func (r room) files() (own, tests []string) {
	for _, name := range r.GoFiles {
		own = append(own, filepath.Join(r.Dir, name))
	}
	for _, name := range append(append([]string{}, r.TestGoFiles...), r.XTestGoFiles...) {
		tests = append(tests, filepath.Join(r.Dir, name))
	}
	return own, tests
}

// house lists the module's packages once for all tests.
var house = sync.OnceValues(func() ([]room, error) {
	out, err := command("go", "list", "-json", "./...")
	if err != nil {
		return nil, err
	}
	var rooms []room
	for decoder := json.NewDecoder(strings.NewReader(out)); ; {
		var r room
		if err := decoder.Decode(&r); errors.Is(err, io.EOF) {
			return rooms, nil
		} else if err != nil {
			return nil, fmt.Errorf("reading the list of packages: %w", err)
		}
		rooms = append(rooms, r)
	}
})

func rooms(t *testing.T) []room {
	t.Helper()
	all, err := house()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// command runs a program in the root of the module and returns its output.
func command(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = filepath.Join("..", "..")
	var complaint strings.Builder
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, &complaint)
	}
	return string(out), nil
}

// within reports whether path is the room named by pattern; a pattern that ends in /... names the rooms below it too.
func within(path, pattern string) bool {
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == below || strings.HasPrefix(path, below+"/")
	}
	return path == pattern
}
