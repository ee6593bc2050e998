package pods

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Names of images on the node.
const (
	image         = "localhost/pillion:test"
	imageIPTables = "localhost/pillion:test-iptables"
	imageWorkload = "localhost/workload:test"
)

// built is the directory of the binary and the images.
var built string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	dir, err := os.MkdirTemp("", "pillion-pods-")
	if err == nil {
		defer os.RemoveAll(dir)
		built = dir
		err = build("../../cmd/pillion", "pillion")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return nettest.Main(m)
}

// build makes a static binary as it ships.
func build(source, name string) error {
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w -X main.version=test", "-o", filepath.Join(built, name), source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", source, err, out)
	}
	return nil
}

// images builds each image once and returns the output of the build.
var images = map[string]func() (output string, err error){
	"image":          sync.OnceValues(func() (string, error) { return buildImage("image") }),
	"image-iptables": sync.OnceValues(func() (string, error) { return buildImage("image-iptables") }),
	"image-pillionctl": sync.OnceValues(func() (string, error) {
		if err := build("../../cmd/pillionctl", "pillionctl"); err != nil {
			return "", err
		}
		return buildImage("image-pillionctl")
	}),
}

// theImage returns the archive of a target and the output of its build.
func theImage(t *testing.T, target string) (archive, output string) {
	t.Helper()
	output, err := images[target]()
	if err != nil {
		t.Fatal(err)
	}
	return archiveOf(target), output
}

func archiveOf(target string) string { return filepath.Join(built, target+".tar") }

// buildImage makes an image of the binary and returns the output of the build.
func buildImage(target string) (output string, err error) {
	program := "pillion"
	if target == "image-pillionctl" {
		program = "pillionctl"
	}
	return runImage(target, filepath.Join(built, program), archiveOf(target), runtime.GOARCH)
}

func runImage(target, binary, archive, archs string) (output string, err error) {
	cmd := exec.Command("../../scripts/image", target, binary, archive)
	cmd.Env = append(os.Environ(), "VERSION=test", "EPOCH=1700000000", "ARCH="+archs)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("scripts/image %s: %w\n%s%s", target, err, out, &complaints)
	}
	return string(out), nil
}
