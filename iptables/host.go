package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Flavour is one of the places in the kernel in which our rules can be: the two in which iptables keeps its own, and our
// table of nftables. All are consulted for every packet, so rules left in one while we look only at another would stay
// active.
type Flavour string

// The flavours.
const (
	NFT    Flavour = "nft"
	Legacy Flavour = "legacy"
	Native Flavour = "nftables" // without a program
)

// Backend is the caller's choice of where new rules are made. Wherever else ours are, they are taken away.
type Backend string

// The backends.
const (
	// Auto is where our rules are already; else IPTables, if its programs are there and the tables that they keep can be
	// used; else NFTables.
	Auto           Backend = ""
	IPTables       Backend = "iptables" // in the flavour that holds our rules or other people's, else in nft
	IPTablesNFT    Backend = "iptables-nft"
	IPTablesLegacy Backend = "iptables-legacy"
	NFTables       Backend = "nftables"
)

// flavour is the only one that the backend allows, if there is one.
func (b Backend) flavour() Flavour {
	return map[Backend]Flavour{IPTablesNFT: NFT, IPTablesLegacy: Legacy, NFTables: Native}[b]
}

const (
	programTimeout = 30 * time.Second
	lockSeconds    = 5        // how long a program may wait for another one that holds the tables
	outputLimit    = 32 << 20 // a table larger than that is not a pod's
)

// program is the iptables of one family and flavour. Its three names are usually one file.
type program struct {
	family              Family
	flavour             Flavour
	main, save, restore string
}

// errNoProgram means that PATH holds no program of the family and flavour.
var errNoProgram = errors.New("not found in PATH")

// findProgram finds iptables by the name that says its flavour, or by its plain name when that turns out to be it.
func findProgram(ctx context.Context, family Family, flavour Flavour) (program, error) {
	plain := "iptables"
	if family == IPv6 {
		plain = "ip6tables"
	}
	full := plain + "-" + string(flavour)
	for _, name := range []string{full, plain} {
		p := program{family: family, flavour: flavour}
		var missing [3]error
		p.main, missing[0] = exec.LookPath(name)
		p.save, missing[1] = exec.LookPath(name + "-save")
		p.restore, missing[2] = exec.LookPath(name + "-restore")
		if errors.Join(missing[:]...) == nil && (name == full || flavourOf(ctx, p.main) == flavour) {
			return p, nil
		}
	}
	return program{}, fmt.Errorf("%s (with -save and -restore): %w", full, errNoProgram)
}

// flavourOf tells what the plain iptables is: by the name of the file that it is a link to, which costs nothing, or else
// by what it says of itself. A version without a flavour is from before there were two.
func flavourOf(ctx context.Context, path string) Flavour {
	if file, err := filepath.EvalSymlinks(path); err == nil {
		switch filepath.Base(file) {
		case "xtables-nft-multi":
			return NFT
		case "xtables-legacy-multi", "xtables-multi":
			return Legacy
		}
	}
	version, err := run(ctx, "", path, "--version")
	switch {
	case err != nil:
		return ""
	case strings.Contains(version, "(nf_tables)"):
		return NFT
	}
	return Legacy
}

// verify makes sure that the program runs at all and knows the options that we give it.
func (p program) verify() error {
	protocol := goiptables.ProtocolIPv4
	if p.family == IPv6 {
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

// verifier verifies each program once, however many names and callers it has.
func verifier() func(program) error {
	verified := make(map[string]error)
	return func(p program) error {
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

// apply commits input, which iptables-restore does whole or not at all.
func (p program) apply(ctx context.Context, input string) error {
	_, err := run(ctx, input, p.restore, "--noflush", "--wait="+strconv.Itoa(lockSeconds))
	if err != nil {
		return fmt.Errorf("changing %s rules: %w", p.family, err)
	}
	return nil
}

// run runs a program to its end and returns what it printed.
func run(ctx context.Context, input, name string, args ...string) (string, error) {
	p, err := start(ctx, input, name, args...)
	if err != nil {
		return "", err
	}
	return p.wait()
}

// process is a program that runs.
type process struct {
	name           string
	input          string
	cmd            *exec.Cmd
	stdout, stderr limitedBuffer
	cancel         context.CancelFunc
}

// start starts a program on the calling thread, and so in its network namespace. wait must be called.
func start(ctx context.Context, input, name string, args ...string) (*process, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	p := &process{name: filepath.Base(name), input: input, cancel: cancel, cmd: exec.CommandContext(ctx, name, args...)}
	p.cmd.Env = append(os.Environ(), "LC_ALL=C")
	p.cmd.Stdin = strings.NewReader(input)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.WaitDelay = time.Second // for what the program left behind with our pipes open
	if err := p.cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// wait returns what the program printed. An error says what it complained of and in which line of its input.
func (p *process) wait() (string, error) {
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

var lineNumber = regexp.MustCompile(`line:? (\d+)`)

func offendingLine(input, stderr string) string {
	found := lineNumber.FindStringSubmatch(stderr)
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

// limitedBuffer takes so much and no more. The program that writes on then ends by SIGPIPE. The buffer is not embedded:
// io.Copy would find its ReadFrom, which knows no limit.
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

// lockName is an abstract socket: its name is known in one network namespace only, needs no file, and is free again as
// soon as its holder is gone.
const lockName = "@pillion/rules"

// Lock keeps other runs of pillion from changing the rules of this network namespace until release is called. Two runs
// at once would make their plans against a state that the other is about to change. It waits for its turn.
func Lock(ctx context.Context) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	for {
		listener, err := new(net.ListenConfig).Listen(ctx, "unix", lockName)
		if err == nil {
			return func() { listener.Close() }, nil
		}
		if errors.Is(err, unix.EADDRINUSE) {
			err = awaitRelease(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("waiting for another run of pillion in this network namespace: %w", err)
		}
	}
}

// awaitRelease returns when the holder of the lock closes it. Nobody accepts the connection; that it is waiting is
// enough for it to be reset.
func awaitRelease(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", lockName)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil // just released
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	conn.Read(make([]byte, 1))
	return ctx.Err()
}

// The agent's source address towards an IPv6 workload. IPv4 has 127.0.0.6 by itself, as part of 127.0.0.0/8.
//
// The address is deprecated from the start: the kernel then does not choose it as the source of other connections, bind
// works all the same, and cleanup knows by it that the address is ours and not somebody else's.
func sourceAddress() *netlink.Addr {
	return &netlink.Addr{
		IPNet:     &net.IPNet{IP: capture.InboundSource6.AsSlice(), Mask: net.CIDRMask(128, 128)},
		Flags:     unix.IFA_F_NODAD,
		ValidLft:  math.MaxUint32,
		LinkIndex: loopbackIndex,
	}
}

// loopbackIndex is the loopback's in every namespace: it is the first interface to be made.
const loopbackIndex = 1

func addSourceAddress() error {
	if err := netlink.AddrAdd(nil, sourceAddress()); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to %s: %w", capture.InboundSource6, loopback, err)
	}
	return nil
}

func removeSourceAddress() error {
	if err := netlink.AddrDel(nil, sourceAddress()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("removing %s from %s: %w", capture.InboundSource6, loopback, err)
	}
	return nil
}
