// Package xtables runs the iptables programs: it finds and verifies them, lists rules, and commits changes by
// iptables-restore --noflush.
//
// A table is committed as a whole or not at all. Declaring a chain of ours empties it, so it is filled again. Rules that
// jump to ours are in built-in chains, among rules of others, and are deleted and appended one by one. Errors name the
// failed line of the input and, where the program's message is known, the cause with its remedy.
//
// github.com/coreos/go-iptables runs a program once and parses its version. It neither lists nor commits: it would start a
// program for each chain to list and for each rule to change, where one iptables-save lists all tables of a family and one
// iptables-restore commits them. It also prefers the plain program name, so the flavour is chosen here.
package xtables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

const (
	programTimeout = 30 * time.Second
	lockSeconds    = 5        // how long a program waits for the xtables lock
	outputLimit    = 32 << 20 // larger tables are not expected in a pod
)

// Program is the iptables of one family and flavour. Its three names are usually links to one file.
type Program struct {
	family              ruleset.Family
	flavour             ruleset.Flavour
	main, Save, restore string
}

// errNoProgram means that PATH holds no program of the family and flavour.
var errNoProgram = errors.New("not found in PATH")

// Find looks in PATH for the programs of a family and flavour: first under the name that contains the flavour, such as
// iptables-nft, then under the plain name if the program behind it has that flavour.
func Find(ctx context.Context, family ruleset.Family, flavour ruleset.Flavour) (Program, error) {
	plain := "iptables"
	if family == ruleset.IPv6 {
		plain = "ip6tables"
	}
	full := plain + "-" + string(flavour)
	for _, name := range []string{full, plain} {
		p := Program{family: family, flavour: flavour}
		var missing [3]error
		p.main, missing[0] = exec.LookPath(name)
		p.Save, missing[1] = exec.LookPath(name + "-save")
		p.restore, missing[2] = exec.LookPath(name + "-restore")
		if errors.Join(missing[:]...) == nil && (name == full || flavourOf(ctx, p.main) == flavour) {
			return p, nil
		}
	}
	return Program{}, fmt.Errorf("%s (with -save and -restore): %w", full, errNoProgram)
}

// flavourOf returns the flavour of a plain iptables. The name of the link target shows it without running the program;
// otherwise its version shows it. A version without a flavour predates nft.
func flavourOf(ctx context.Context, path string) ruleset.Flavour {
	if file, err := filepath.EvalSymlinks(path); err == nil {
		switch filepath.Base(file) {
		case "xtables-nft-multi":
			return ruleset.NFT
		case "xtables-legacy-multi", "xtables-multi":
			return ruleset.Legacy
		}
	}
	version, err := run(ctx, "", path, "--version")
	switch {
	case err != nil:
		return ""
	case strings.Contains(version, "(nf_tables)"):
		return ruleset.NFT
	}
	return ruleset.Legacy
}

// verify returns an error if the program does not run or is too old for the options that we use.
func (p Program) verify() error {
	protocol := goiptables.ProtocolIPv4
	if p.family == ruleset.IPv6 {
		protocol = goiptables.ProtocolIPv6
	}
	known, err := goiptables.New(goiptables.Path(p.main), goiptables.IPFamily(protocol), goiptables.Timeout(lockSeconds))
	if err != nil {
		return fmt.Errorf("verifying %s: %w", p.main, err)
	}
	v1, v2, v3 := known.GetIptablesVersion()
	if slices.Compare([]int{v1, v2, v3}, []int{1, 6, 2}) < 0 {
		return fmt.Errorf("%s is version %d.%d.%d: 1.6.2 or later is needed, whose restore can wait for the lock", p.main, v1, v2, v3)
	}
	return nil
}

// NewVerifier returns a function that verifies a program. Programs that are links to one file are verified once.
func NewVerifier() func(Program) error {
	verified := make(map[string]error)
	return func(p Program) error {
		file, err := filepath.EvalSymlinks(p.main)
		if err != nil {
			file = p.main
		}
		if _, known := verified[file]; !known {
			verified[file] = p.verify()
		}
		return verified[file]
	}
}

// Apply commits input by iptables-restore, each table as a whole or not at all.
func (p Program) Apply(ctx context.Context, input string) error {
	_, err := run(ctx, input, p.restore, "--noflush", "--wait="+strconv.Itoa(lockSeconds))
	if err != nil {
		return fmt.Errorf("changing %s rules: %w", p.family, err)
	}
	return nil
}

// run runs a program and returns its output.
func run(ctx context.Context, input, name string, args ...string) (string, error) {
	p, err := Start(ctx, input, name, args...)
	if err != nil {
		return "", err
	}
	return p.Wait()
}

// Process is a running program.
type Process struct {
	name           string
	input          string
	cmd            *exec.Cmd
	stdout, stderr limitedBuffer
	cancel         context.CancelFunc
}

// Start starts a program on the calling thread, and so in its network namespace. The caller must call Wait.
func Start(ctx context.Context, input, name string, args ...string) (*Process, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	p := &Process{name: filepath.Base(name), input: input, cancel: cancel, cmd: exec.CommandContext(ctx, name, args...)}
	p.cmd.Env = append(os.Environ(), "LC_ALL=C")
	p.cmd.Stdin = strings.NewReader(input)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.WaitDelay = time.Second // if a child of the program keeps our pipes open
	if err := p.cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// Wait returns the program's output. An error contains its message and the failed line of its input.
func (p *Process) Wait() (string, error) {
	defer p.cancel()
	err := p.cmd.Wait()
	if err == nil {
		return p.stdout.String(), nil
	}
	if p.stdout.full || p.stderr.full {
		return "", fmt.Errorf("running %s: %w", p.name, errTooMuchOutput)
	}
	message := fmt.Sprintf("running %s: %v", p.name, err)
	if complaint := complaint(p.stderr.String()); complaint != "" {
		message += ": " + complaint
	}
	line := offendingLine(p.input, p.stderr.String())
	if line != "" {
		message += " (in: " + line + ")"
	}
	if why := diagnose(p.stderr.String(), line); why != nil {
		return "", fmt.Errorf("%s: %w", message, why)
	}
	return "", errors.New(message)
}

func offendingLine(input, stderr string) string {
	found := regexp.MustCompile(`line:? (\d+)`).FindStringSubmatch(stderr)
	if found == nil {
		return ""
	}
	number, err := strconv.Atoi(found[1])
	lines := strings.Split(strings.TrimSpace(input), "\n")
	if err != nil || number < 1 || number > len(lines) {
		return ""
	}
	return lines[number-1]
}

// limitedBuffer accepts outputLimit bytes. A program that writes more is ended by SIGPIPE. The buffer is not embedded,
// because io.Copy would then use its ReadFrom, without the limit.
type limitedBuffer struct {
	buffer bytes.Buffer
	full   bool
}

func (b *limitedBuffer) String() string { return b.buffer.String() }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.full = b.buffer.Len()+len(p) > outputLimit; b.full {
		return 0, errTooMuchOutput
	}
	return b.buffer.Write(p)
}

var errTooMuchOutput = fmt.Errorf("more than %d MiB of output", outputLimit>>20)

// ErrHiddenTables means that the kernel shows the list of legacy tables only to the root of another user namespace. This
// is so if the network namespace was created before the user namespace had its users.
var ErrHiddenTables = errors.New("the list of legacy tables cannot be read in this user namespace")

// LegacyTablesExist reports whether the namespace has a legacy table of the family. A table is created when a program
// first uses it, and stays.
func LegacyTablesExist(family ruleset.Family) (bool, error) {
	path := "/proc/thread-self/net/ip_tables_names"
	if family == ruleset.IPv6 {
		path = "/proc/thread-self/net/ip6_tables_names"
	}
	names, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() == 0:
		return false, ErrHiddenTables
	case errors.Is(err, fs.ErrPermission):
		return false, fmt.Errorf("looking for legacy tables: %w; run as user 0", err)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("looking for legacy tables: %w", err)
	}
	return len(names) > 0, nil
}
