package pods

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// archive is an image in a file: the files of an OCI layout by name.
type archive map[string][]byte

func openArchive(t *testing.T, name string) archive {
	t.Helper()
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	a := archive{}
	for reader := tar.NewReader(file); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return a
		} else if err != nil {
			t.Fatal(err)
		}
		if a[header.Name], err = io.ReadAll(reader); err != nil {
			t.Fatal(err)
		}
	}
}

// descriptor refers to another part of an image.
type descriptor struct{ Digest string }

func (a archive) decode(t *testing.T, d descriptor, into any) {
	t.Helper()
	if err := json.Unmarshal(a[d.blob()], into); err != nil {
		t.Fatal(err)
	}
}

func (d descriptor) blob() string { return "blobs/" + strings.ReplaceAll(d.Digest, ":", "/") }

// settings are the fields that a runtime reads from an image.
type settings struct {
	Architecture string
	Config       struct {
		User       string
		Entrypoint []string
		Cmd        []string
		Env        []string
		Labels     map[string]string
	}
}

// contents returns the settings and the files in the layers.
func (a archive) contents(t *testing.T) (set settings, files map[string]*tar.Header) {
	t.Helper()
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal(a["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	return a.image(t, index.Manifests[0])
}

// image returns the same of the image with a manifest.
func (a archive) image(t *testing.T, d descriptor) (set settings, files map[string]*tar.Header) {
	t.Helper()
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	a.decode(t, d, &manifest)
	a.decode(t, manifest.Config, &set)
	files = map[string]*tar.Header{}
	for _, layer := range manifest.Layers {
		plain, err := gzip.NewReader(strings.NewReader(string(a[layer.blob()])))
		if err != nil {
			t.Fatal(err)
		}
		for reader := tar.NewReader(plain); ; {
			header, err := reader.Next()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			files[strings.TrimSuffix(header.Name, "/")] = header
		}
	}
	return set, files
}

func TestTheSameBinaryGivesTheSameImage(t *testing.T) {
	for _, target := range []string{"image", "image-iptables", "image-pillionctl"} {
		_, first := theImage(t, target)
		second, err := buildImage(target)
		if err != nil || first != second || !strings.Contains(first, "sha256:") {
			t.Errorf("two builds differ (%v):\n%s%s", err, first, second)
		}
	}
}

func TestAnIndexHasAnImageForEachArchitecture(t *testing.T) {
	program, err := os.ReadFile(filepath.Join(built, "pillion"))
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	for _, arch := range []string{"amd64", "arm64"} {
		if err := os.Mkdir(filepath.Join(directory, arch), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(directory, arch, "pillion"), program, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	output, err := runImage("image", filepath.Join(directory, "%", "pillion"), filepath.Join(directory, "index.tar"), "amd64 arm64")
	if err != nil {
		t.Fatal(err)
	}
	a := openArchive(t, filepath.Join(directory, "index.tar"))
	var top, index struct {
		Manifests []struct {
			descriptor
			Platform struct{ Architecture, OS string }
		}
	}
	if err := json.Unmarshal(a["index.json"], &top); err != nil || len(top.Manifests) != 1 {
		t.Fatalf("%v: %s", err, a["index.json"])
	}
	a.decode(t, top.Manifests[0].descriptor, &index)
	var archs []string
	for _, m := range index.Manifests {
		set, files := a.image(t, m.descriptor)
		if set.Architecture != m.Platform.Architecture || m.Platform.OS != "linux" || files["usr/local/bin/pilot-agent"] == nil {
			t.Errorf("%+v has %+v and %d files", m, set, len(files))
		}
		checkSettings(t, set, 0)
		archs = append(archs, set.Architecture)
	}
	if slices.Sort(archs); !slices.Equal(archs, []string{"amd64", "arm64"}) || !strings.Contains(output, top.Manifests[0].Digest) {
		t.Errorf("the index has %v; the build printed %s", archs, output)
	}
}

func TestTheImageHasOnlyTheBinary(t *testing.T) {
	name, _ := theImage(t, "image")
	set, files := openArchive(t, name).contents(t)
	var names []string
	size := int64(0)
	for name, header := range files {
		size += header.Size
		if header.Typeflag != tar.TypeDir {
			names = append(names, name)
		}
		if header.Uid != 0 || header.Gid != 0 || header.ModTime.Unix() != 1700000000 {
			t.Errorf("%s: user %d, group %d, time %v", name, header.Uid, header.Gid, header.ModTime)
		}
		if want := map[string]int64{"etc/passwd": 0o644, "usr/local/bin/pilot-agent": 0o755, "etc": 0o755}[name]; want != 0 && header.Mode&0o777 != want {
			t.Errorf("%s has mode %o, want %o", name, header.Mode, want)
		}
	}
	slices.Sort(names)
	if want := []string{"etc/group", "etc/passwd", "usr/local/bin/pillion", "usr/local/bin/pilot-agent"}; !slices.Equal(names, want) {
		t.Errorf("it has %v, want %v", names, want)
	}
	if link := files["usr/local/bin/pillion"]; link.Typeflag != tar.TypeSymlink || link.Linkname != "pilot-agent" {
		t.Errorf("pillion is not a link to pilot-agent: %+v", link)
	}
	checkSettings(t, set, size)
}

func TestTheImageWithIPTablesHasBothFlavoursInLessThan22MB(t *testing.T) {
	name, _ := theImage(t, "image-iptables")
	set, files := openArchive(t, name).contents(t)
	size := int64(0)
	for _, header := range files {
		size += header.Size
	}
	checkSettings(t, set, size)
	for _, want := range []string{"usr/sbin/xtables-nft-multi", "usr/sbin/xtables-legacy-multi", "usr/sbin/iptables", "usr/sbin/ip6tables-legacy-restore", "usr/sbin/iptables-nft-save"} {
		if files[want] == nil {
			t.Errorf("it has no %s", want)
		}
	}
	for name := range files {
		if slices.Contains([]string{"sh", "bash", "dash", "busybox"}, filepath.Base(name)) {
			t.Errorf("there is a shell: %s", name)
		}
	}
}

func TestTheWebhooksImageHasOnlyItsProgram(t *testing.T) {
	name, _ := theImage(t, "image-pillionctl")
	set, files := openArchive(t, name).contents(t)
	program := files["usr/local/bin/pillionctl"]
	for name, header := range files {
		if header.Typeflag != tar.TypeDir && header != program {
			t.Errorf("it has %s", name)
		}
	}
	if program == nil || program.Size > 20e6 || set.Config.User != "65532:65532" || !slices.Equal(set.Config.Entrypoint, []string{"/usr/local/bin/pillionctl"}) {
		t.Errorf("%+v: %+v", program, set.Config)
	}
}

func checkSettings(t *testing.T, set settings, size int64) {
	t.Helper()
	c := set.Config
	if size > 22e6 {
		t.Errorf("it has %d bytes", size)
	}
	if c.User != "1337:1337" || !slices.Equal(c.Entrypoint, []string{"/usr/local/bin/pilot-agent"}) || len(c.Cmd) > 0 {
		t.Errorf("it runs %v %v as %s", c.Entrypoint, c.Cmd, c.User)
	}
	if c.Labels["org.opencontainers.image.version"] != "test" || c.Labels["org.opencontainers.image.title"] != "pillion" {
		t.Errorf("its labels are %v", c.Labels)
	}
	for label := range c.Labels {
		if !strings.HasPrefix(label, "org.opencontainers.image.") {
			t.Errorf("the build tool added the label %s", label)
		}
	}
}
