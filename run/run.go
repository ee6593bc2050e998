// Package run runs a command in a sandbox and carries its traffic: what `pillion run` does.
//
// The sandbox redirects the command's connections and DNS queries to sockets that this process holds. They are carried by
// the outbound role and the resolver of the agent, with sockets of the caller's own network. So the command reaches what
// the caller reaches, and each connection and request has a record. When the command ends, everything ends.
package run

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/egress"
	"github.com/pillion-proxy/pillion/internal/fault"
	"github.com/pillion-proxy/pillion/internal/sandbox"
)

// Config configures a run. Command, Errors and Log are required.
type Config struct {
	Command []string
	Version string

	Log         string // off, text or json on Errors, or the path of a file; json in a file whose name ends with .json or .jsonl
	Record      string // file for all records, an HTTP Archive if its name ends with .har; empty: not written
	Bodies      int    // bytes of a body that an archive has; 0: none
	Credentials bool   // an archive has credentials in clear
	Summary     bool   // print a table of the destinations at the end
	UI          string // address of the live page; empty: not served

	HostLoopback capture.Ports    // ports of loopback addresses that lead to the caller's loopback
	Servers      []netip.AddrPort // DNS servers; empty: those of /etc/resolv.conf

	Publish    []Port // ports of the command's servers that are reachable from outside
	PublishAll bool   // publish whatever the command listens at, on loopback

	Rules egress.Rules // which destinations the command may reach

	Faults fault.Set // for requests and connections, in both directions

	Datagrams bool // carry UDP besides DNS; otherwise it is rejected

	Decrypt bool // end TLS here; the command gets a certificate authority of this run

	Errors io.Writer    // for people, such as standard error
	Logger *slog.Logger // for warnings of the parts
}

// governs reports whether there are rules.
func (c *Config) governs() bool {
	return len(c.Rules.Allow)+len(c.Rules.Deny) > 0 || c.Rules.DenyOthers
}

// Archives reports whether an HTTP Archive is written, for which heads are recorded.
func (c *Config) Archives() bool { return hasSuffix(c.Record, ".har") }

// hasSuffix compares the end of a file's name, in any case.
func hasSuffix(path, suffix string) bool { return strings.HasSuffix(strings.ToLower(path), suffix) }

// Exit statuses for a command that could not be started, as those of a shell.
const (
	NotExecutable = 126
	NotFound      = 127
)

// endTime bounds how long connections may take to end once the command has ended.
const endTime = time.Second

// Run runs the command and returns its exit status: 128 and the number of a signal that ended it. An error means that it
// was not started; status is then what a shell would return.
func Run(config Config) (status int, err error) {
	surviveClosedOutput()
	path, status, err := find(config.Command[0])
	if err != nil {
		return status, err
	}
	r := &run{config: config}
	defer r.close()
	if err := r.build(); err != nil {
		return 1, err
	}
	r.running.Store(true)
	status, err = r.sandbox.Run(sandbox.Command{Path: path, Arguments: config.Command, Environment: r.environment()})
	r.stopSignals()
	r.end()
	var start *sandbox.StartError
	if errors.As(err, &start) {
		if start.Found {
			return NotExecutable, err
		}
		return NotFound, err
	}
	if err != nil {
		return 1, err
	}
	return status, nil
}

// find returns the program of a command, before anything is set up for it.
func find(name string) (path string, status int, err error) {
	path, err = exec.LookPath(name)
	switch {
	case err == nil, errors.Is(err, exec.ErrDot):
		return path, 0, nil
	case errors.Is(err, syscall.EISDIR):
		return "", NotExecutable, fmt.Errorf("%s: is a directory", name)
	case errors.Is(err, os.ErrPermission):
		return "", NotExecutable, fmt.Errorf("%s: permission denied", name)
	}
	return "", NotFound, fmt.Errorf("%s: command not found", name)
}

// run is a run in progress.
type run struct {
	config     Config
	sandbox    *sandbox.Sandbox
	records    *records
	traffic    *traffic
	inbound    *publisher // nil: no port is published
	page       *page
	decryption *decryption // nil: TLS passes

	running     atomic.Bool // the command is started, or about to be
	stopSignals func()      // nil: none are forwarded
}

// build prepares everything while the sandbox makes its network.
func (r *run) build() error {
	var err error
	r.sandbox, err = sandbox.Start(sandbox.Config{
		IPv6: hasIPv6(), Loopback: r.config.HostLoopback, Datagrams: r.config.Datagrams,
		Dropped: func(destination string) { r.records.dropped(destination) }, // once the command runs
	})
	if err != nil {
		return err
	}
	r.stopSignals = sync.OnceFunc(r.forwardSignals())
	if r.records, err = openRecords(r.config); err != nil {
		return err
	}
	for _, line := range unreachableProxies(os.Getenv, r.config.HostLoopback) {
		r.report(line)
	}
	if r.config.Decrypt {
		if r.decryption, err = newDecryption(r.report); err != nil {
			return err
		}
		r.records.decryption = r.decryption
	}
	if r.traffic, err = newTraffic(r.config, r.records); err != nil {
		return err
	}
	if err := r.sandbox.Await(); err != nil {
		return err
	}
	if err := r.traffic.adopt(r.config, r.sandbox, r.records, r.decryption); err != nil {
		return err
	}
	if len(r.config.Publish) > 0 || r.config.PublishAll {
		if r.inbound, err = newPublisher(r.config, r.sandbox, r.traffic); err != nil {
			return err
		}
	}
	if r.config.UI != "" {
		if r.page, err = servePage(r.config, r.traffic, r.records); err != nil {
			return err
		}
	}
	r.traffic.start()
	return nil
}

// report prints a line for people.
func (r *run) report(line string) { fmt.Fprintln(r.config.Errors, "pillion:", line) }

// environment has the variables that the command gets besides the caller's.
func (r *run) environment() []string {
	if r.decryption == nil {
		return nil
	}
	return r.decryption.variables
}

// end lets connections end, and prints what is left to print.
func (r *run) end() {
	ctx, cancel := context.WithTimeout(context.Background(), endTime)
	defer cancel()
	if r.inbound != nil {
		r.inbound.end(ctx)
	}
	r.traffic.end(ctx)
	r.records.end()
}

func (r *run) close() {
	if r.stopSignals != nil {
		r.stopSignals()
	}
	if r.page != nil {
		r.page.close()
	}
	if r.inbound != nil {
		r.inbound.close()
	}
	if r.sandbox != nil {
		r.sandbox.Close()
	}
	if r.traffic != nil {
		r.traffic.close()
	}
	if r.records != nil {
		r.records.end()
	}
	if r.decryption != nil {
		r.decryption.close()
	}
}

// hasIPv6 reports whether the caller has a route to IPv6 hosts, global or of a site. Connecting a UDP socket sends nothing.
func hasIPv6() bool {
	for _, address := range []string{"[2000::1]:9", "[fd00::1]:9"} {
		if conn, err := net.Dial("udp6", address); err == nil {
			conn.Close()
			return true
		}
	}
	return false
}
