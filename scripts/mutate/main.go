// Command mutate changes the code of packages, one small change at a time, and lists the changes that no test notices.
//
//	go run ./scripts/mutate -n 40 -seed 1 ./internal/relay ./internal/http2
//
// It works on a copy of the module, and runs the tests of the changed package only. A survivor is a missing test, or a
// change without a meaning: a reader decides. A mutant that does not compile, or that reaches the time limit, counts as
// noticed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	count := flag.Int("n", 20, "how many mutants to try")
	seed := flag.Uint64("seed", 1, "chooses the mutants")
	limit := flag.Duration("timeout", 2*time.Minute, "time limit of one test run")
	flag.Parse()
	survivors, err := run(flag.Args(), *count, *seed, *limit)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(2)
	}
	fmt.Printf("%d of %d mutants survived\n", survivors, *count)
	if survivors > 0 {
		os.Exit(1)
	}
}

// candidate is a mutation of a file, whose name is relative to the module.
type candidate struct {
	pkg, file string
	mutation
}

func run(packages []string, count int, seed uint64, limit time.Duration) (survivors int, err error) {
	all, err := candidates(packages)
	if err != nil {
		return 0, err
	}
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	dir, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := copyModule(dir); err != nil {
		return 0, err
	}
	for i, c := range all[:min(count, len(all))] {
		verdict, err := c.try(dir, limit)
		if err != nil {
			return survivors, err
		}
		fmt.Printf("%3d %-9s %s:%d: %s\n", i+1, verdict, c.file, c.line, c.what)
		if verdict == "survived" {
			survivors++
		}
	}
	return survivors, nil
}

// candidates returns every mutation of the packages' own files.
func candidates(packages []string) (all []candidate, err error) {
	out, err := exec.Command("go", append([]string{"list", "-json=Dir,ImportPath,GoFiles"}, packages...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	here, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	for decoder := json.NewDecoder(strings.NewReader(string(out))); decoder.More(); {
		var p struct {
			Dir, ImportPath string
			GoFiles         []string
		}
		if err := decoder.Decode(&p); err != nil {
			return nil, err
		}
		for _, name := range p.GoFiles {
			path := filepath.Join(p.Dir, name)
			source, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			relative, err := filepath.Rel(here, path)
			if err != nil {
				return nil, err
			}
			found, err := mutations(source)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", relative, err)
			}
			for _, m := range found {
				all = append(all, candidate{p.ImportPath, relative, m})
			}
		}
	}
	return all, nil
}

// copyModule copies the files of the module that git tracks or would add, from the working directory.
func copyModule(dir string) error {
	out, err := exec.Command("git", "ls-files", "-z", "-co", "--exclude-standard").Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		content, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(to, content, info.Mode().Perm()); err != nil {
			return err
		}
	}
	return nil
}

// try applies the mutation in dir, runs the package's tests, and takes the mutation back.
func (c candidate) try(dir string, limit time.Duration) (verdict string, err error) {
	path := filepath.Join(dir, c.file)
	original, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(path, c.apply(original), 0o644); err != nil {
		return "", err
	}
	defer os.WriteFile(path, original, 0o644)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	test := exec.CommandContext(ctx, "go", "test", "-buildvcs=false", "-count=1", "-failfast", "-timeout", limit.String(), c.pkg)
	test.Dir = dir
	out, err := test.CombinedOutput()
	switch {
	case err == nil:
		return "survived", nil
	case strings.Contains(string(out), "[build failed]"):
		return "no build", nil
	}
	return "noticed", nil
}
