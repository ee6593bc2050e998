package arch

import (
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// root is the directory of the module, from this package.
const root = "../.."

// documents returns the Markdown files in git, by their paths from the root.
func documents(t *testing.T) map[string]string {
	t.Helper()
	out, err := exec.Command("git", "-C", root, "ls-files", "-co", "--exclude-standard", "*.md").Output()
	if err != nil {
		t.Fatalf("listing the documents: %v", err)
	}
	texts := make(map[string]string)
	for _, name := range strings.Fields(string(out)) {
		text, err := os.ReadFile(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // deleted in the work tree
		} else if err != nil {
			t.Fatal(err)
		}
		texts[name] = string(text)
	}
	if len(texts) == 0 {
		t.Fatal("no documents")
	}
	return texts
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	code    = regexp.MustCompile("`([^`\n]+)`")
	fence   = regexp.MustCompile("(?ms)^```.*?^```$")
)

// anchors returns the anchors that GitHub generates for a document's headings.
func anchors(text string) (names []string) {
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		name := strings.ToLower(regexp.MustCompile(`[^\pL\pN _-]`).ReplaceAllString(m[1], ""))
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

func TestLinksInDocumentsExist(t *testing.T) {
	texts := documents(t)
	links := 0
	for name, text := range texts {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			links++
			target, anchor, _ := strings.Cut(m[1], "#")
			to := name
			if target != "" {
				to = path.Join(path.Dir(name), target)
			}
			if _, err := os.Stat(filepath.Join(root, to)); err != nil {
				t.Errorf("%s: the link to %s: %v", name, m[1], err)
			} else if anchor != "" && !slices.Contains(anchors(texts[to]), anchor) {
				t.Errorf("%s: %s has no heading #%s", name, to, anchor)
			}
		}
	}
	if links == 0 {
		t.Error("found no links")
	}
}

// Paths of this repository in code spans exist: a path begins with a directory of the root and has a slash.
func TestPathsInDocumentsExist(t *testing.T) {
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	var directories []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != "bin" && e.Name() != ".git" {
			directories = append(directories, e.Name())
		}
	}
	paths := 0
	for name, text := range documents(t) {
		for _, m := range code.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			word := strings.TrimSuffix(m[1], "/")
			first, _, isPath := strings.Cut(word, "/")
			if !isPath || !slices.Contains(directories, first) || strings.ContainsAny(word, " *{}…") {
				continue
			}
			paths++
			if _, err := os.Stat(filepath.Join(root, word)); err != nil {
				t.Errorf("%s names `%s`: %v", name, m[1], err)
			}
		}
	}
	if paths == 0 {
		t.Error("found no paths")
	}
}
