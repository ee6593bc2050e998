// Package preflight checks what init and the agent need from a network namespace, its kernel and its container.
//
// It does not change the namespace. It tries to install rules in a new network namespace and removes that afterwards; the
// kernel may load modules for this, as it does for init. Every function works in the network namespace of the calling thread
// and stays on that thread.
package preflight

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/checklist"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/netns"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// Config describes what is checked.
type Config struct {
	Version     string                // of this program
	Admin       string                // address of the agent's admin server
	Ports       []Port                // of the agent
	MemoryLimit func() (int64, error) // of the container, in bytes; 0: no limit
	HowToLook   func(error) error     // adds to a missing capability how else to read the rules
	Elsewhere   bool                  // the network namespace is not that of this process's container: its limits say nothing
}

// Port is a port of the agent, and the setting that changes it.
type Port struct {
	Number  uint16
	Setting string
}

// checker collects results. agent is nil if no agent answers.
type checker struct {
	Config
	list  checklist.List
	agent *live.Snapshot
	root  string // of /proc
}

// Run runs all checks.
func Run(ctx context.Context, config Config) checklist.List {
	c := &checker{Config: config, root: "/proc"}
	silence := c.ask(ctx)
	c.versions()
	c.askedAgent(silence)
	capable := c.capabilities()
	c.installs(ctx, capable)
	c.rules(ctx)
	c.ports()
	c.ephemeralPorts()
	if !c.Elsewhere {
		c.memory()
		c.descriptors()
	}
	c.conntrack()
	return c.list
}

// maxAnswer bounds what is read of the agent's state.
const maxAnswer = 16 << 20

// ask reads the agent's state. It uses one socket of this thread, because net/http dials on threads that are in another
// network namespace.
func (c *checker) ask(ctx context.Context) error {
	dialer := net.Dialer{Timeout: 2 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", c.Admin)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	request, err := http.NewRequest(http.MethodGet, "http://"+c.Admin+"/live", nil)
	if err != nil {
		return err
	}
	request.Close = true
	if err := request.Write(conn); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("it answered %s", response.Status)
	}
	var s live.Snapshot
	if err := json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(&s); err != nil {
		return fmt.Errorf("it is not an agent of pillion: %w", err)
	}
	c.agent = &s
	return nil
}

func (c *checker) versions() {
	release, _ := os.ReadFile(c.root + "/sys/kernel/osrelease")
	text := fmt.Sprintf("pillion %s, Linux %s, %s", c.Version, strings.TrimSpace(string(release)), runtime.GOARCH)
	if c.agent != nil && c.agent.Version != c.Version {
		c.list.AddWithRemedy("versions", checklist.Warning, text+"; the agent is "+c.agent.Version, "use the same image for init, agent and this command")
		return
	}
	c.list.Add("versions", checklist.OK, text)
}

func (c *checker) askedAgent(silence error) {
	const name = "agent"
	switch {
	case errors.Is(silence, syscall.ECONNREFUSED):
		c.list.Add(name, checklist.Skipped, "no agent runs here: nothing listens at "+c.Admin)
	case errors.Is(silence, syscall.ENETUNREACH):
		c.list.AddWithRemedy(name, checklist.Warning, c.Admin+" is unreachable", "is lo up in this network namespace? The agent and the workload need it")
	case silence != nil:
		c.list.AddWithRemedy(name, checklist.Failed, fmt.Sprintf("%s does not answer as an agent: %v", c.Admin, silence), "is --admin right?")
	case c.agent.Ready:
		c.list.Add(name, checklist.OK, fmt.Sprintf("ready, up %v", (time.Duration(c.agent.UptimeSeconds)*time.Second).String()))
	default:
		var closed []string
		for _, gate := range c.agent.Gates {
			if !gate.Open {
				closed = append(closed, gate.Name+": "+gate.Why)
			}
		}
		c.list.AddWithRemedy(name, checklist.Failed, "not ready: "+strings.Join(closed, "; "), "docs/troubleshooting.md lists the gates")
	}
}

// capabilities reports whether this process may change rules.
func (c *checker) capabilities() bool {
	const name = "capabilities"
	err := kernel.MissingCapability(false)
	var missing kernel.MissingCapabilityError
	switch {
	case errors.As(err, &missing) && c.agent != nil:
		c.list.Add(name, checklist.Skipped, fmt.Sprintf("CAP_%s is missing; init needs it, the agent does not", string(missing)))
	case err != nil:
		c.list.Add(name, checklist.Failed, err.Error())
	case kernel.MissingCapability(true) != nil:
		c.list.Add(name, checklist.Warning, "NET_ADMIN, but not NET_RAW, which iptables-legacy needs")
	default:
		c.list.Add(name, checklist.OK, "NET_ADMIN, NET_RAW")
	}
	return err == nil
}

// installs tries to install the rules of each kind in a namespace of its own.
func (c *checker) installs(ctx context.Context, capable bool) {
	everything := capture.Default()
	everything.Inbound, everything.Outbound = capture.Ports{All: true}, capture.Prefixes{All: true}
	transparent, resolving := everything, everything
	transparent.Mode = capture.TPROXY
	resolving.RedirectDNS, resolving.CaptureAllDNS = true, true
	for _, kind := range []struct {
		name     string
		spec     capture.Spec
		optional string
	}{
		{"rules: REDIRECT", everything, ""},
		{"rules: TPROXY", transparent, "only --interception-mode TPROXY needs it"},
		{"rules: DNS", resolving, "only DNS capture needs it"},
	} {
		if !capable {
			c.list.Add(kind.name, checklist.Skipped, "trying needs the capabilities of init")
			continue
		}
		tried, err := c.try(ctx, kind.spec)
		switch {
		case err == nil:
			c.list.Add(kind.name, checklist.OK, tried)
		case kind.optional != "":
			c.list.AddWithRemedy(kind.name, checklist.Warning, err.Error(), kind.optional)
		default:
			c.list.Add(kind.name, checklist.Failed, err.Error())
		}
	}
}

// try installs rules in a new namespace. Without permission to create one it only plans them in this one.
func (c *checker) try(ctx context.Context, spec capture.Spec) (string, error) {
	spec.ProxyUIDs = []capture.IDRange{{First: capture.DefaultProxyID, Last: capture.DefaultProxyID}}
	spec.ProxyGIDs = spec.ProxyUIDs
	if err := spec.Validate(); err != nil {
		return "", err
	}
	namespace, err := netns.New()
	if errors.Is(err, unix.EPERM) {
		plan, err := iptables.PlanInit(ctx, spec, iptables.Auto)
		if err == nil {
			err = plan.Unread
		}
		return "the tables are readable; installing was not tried, because that needs CAP_SYS_ADMIN", err
	}
	if err != nil {
		return "", err
	}
	defer namespace.Close()
	installed := ""
	err = namespace.Do(func() error {
		if err := kernel.LinkUp("lo"); err != nil {
			return fmt.Errorf("setting lo up: %w", err)
		}
		plan, err := iptables.PlanInit(ctx, spec, iptables.Auto)
		if err == nil {
			err = plan.Commit(ctx)
		}
		if err == nil {
			installed = plan.Summary()
		}
		return err
	})
	return installed, err
}

// rules checks the rules in force.
func (c *checker) rules(ctx context.Context) {
	const name = "rules in force"
	found, err := iptables.Look(ctx)
	if errors.As(err, new(kernel.MissingCapabilityError)) {
		c.list.Add(name, checklist.Skipped, c.HowToLook(err).Error())
		return
	}
	if err != nil {
		c.list.Add(name, checklist.Failed, err.Error())
		return
	}
	ours := 0
	var where []string
	for _, held := range found.Held {
		before := ours
		for _, r := range held.Rules.All() {
			if r.ID != "" {
				ours++
			}
		}
		if ours > before {
			where = append(where, fmt.Sprintf("%s %s", held.Rules.Family, held.Flavour))
		}
	}
	switch {
	case ours > 0:
		c.list.Add(name, checklist.OK, fmt.Sprintf("%d rules of pillion in %s", ours, strings.Join(where, ", ")))
	case c.agent != nil:
		c.list.AddWithRemedy(name, checklist.Failed, "no rules of pillion, but an agent runs: its traffic is not captured", "run pillion init, or look at the log of the init container")
	default:
		c.list.Add(name, checklist.OK, "no rules of pillion")
	}
}

// ports checks that the agent can bind its ports.
func (c *checker) ports() {
	const name = "ports"
	if c.agent != nil {
		c.list.Add(name, checklist.Skipped, "the agent listens on its ports")
		return
	}
	var free, taken []string
	for _, port := range c.Ports {
		listener, err := net.Listen("tcp4", ":"+strconv.Itoa(int(port.Number)))
		switch {
		case err == nil:
			listener.Close()
			free = append(free, strconv.Itoa(int(port.Number)))
		case errors.Is(err, unix.EADDRINUSE):
			taken = append(taken, fmt.Sprintf("%d (%s) is in use", port.Number, port.Setting))
		default:
			taken = append(taken, fmt.Sprintf("%d (%s): %v", port.Number, port.Setting, err))
		}
	}
	if len(taken) > 0 {
		c.list.AddWithRemedy(name, checklist.Failed, strings.Join(taken, ", "), "stop the process that listens there, or choose another port by the setting")
		return
	}
	c.list.Add(name, checklist.OK, strings.Join(free, ", ")+" are free")
}

// ephemeralPorts checks that the kernel gives no port of the agent to a connection of the workload.
func (c *checker) ephemeralPorts() {
	const name = "ephemeral ports"
	first, last, err := c.pair("/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		c.list.Add(name, checklist.Skipped, err.Error())
		return
	}
	reserved, _ := os.ReadFile(c.root + "/sys/net/ipv4/ip_local_reserved_ports")
	spared, err := capture.ParsePortList(strings.ReplaceAll(strings.TrimSpace(string(reserved)), "-", ":"))
	if err != nil {
		spared = nil
	}
	var inside []string
	for _, port := range c.Ports {
		n := uint64(port.Number)
		kept := slices.ContainsFunc(spared, func(r capture.PortRange) bool { return r.First <= port.Number && port.Number <= r.Last })
		if first <= n && n <= last && !kept {
			inside = append(inside, strconv.Itoa(int(port.Number)))
		}
	}
	text := fmt.Sprintf("%d to %d", first, last)
	if len(inside) > 0 {
		c.list.AddWithRemedy(name, checklist.Warning, text+" contain "+strings.Join(inside, ", ")+" of the agent: a connection can take its port before it starts",
			"add them to net.ipv4.ip_local_reserved_ports")
		return
	}
	c.list.Add(name, checklist.OK, text)
}

const littleMemory = 64 << 20

func (c *checker) memory() {
	const name = "memory limit"
	limit, err := c.MemoryLimit()
	switch {
	case err != nil:
		c.list.Add(name, checklist.Warning, err.Error())
	case limit == 0:
		c.list.Add(name, checklist.OK, "none")
	case limit < littleMemory:
		c.list.AddWithRemedy(name, checklist.Warning, fmt.Sprintf("%d MiB", limit>>20), fmt.Sprintf("give the agent's container %d MiB or more", littleMemory>>20))
	default:
		c.list.Add(name, checklist.OK, fmt.Sprintf("%d MiB", limit>>20))
	}
}

// fewDescriptors is enough for about a thousand connections, each of which has two sockets and may have two pipes.
const fewDescriptors = 4096

func (c *checker) descriptors() {
	const name = "file descriptors"
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		c.list.Add(name, checklist.Skipped, err.Error())
		return
	}
	if limit.Max < fewDescriptors {
		c.list.AddWithRemedy(name, checklist.Warning, fmt.Sprintf("%d", limit.Max), "raise the hard limit nofile; each connection takes two to six")
		return
	}
	c.list.Add(name, checklist.OK, fmt.Sprintf("%d", limit.Max))
}

// conntrack checks how full the table of tracked connections is. Full, it drops new connections.
func (c *checker) conntrack() {
	const name, nearlyFull = "connection tracking", 80
	count, err := c.number("/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		c.list.Add(name, checklist.Skipped, "not in use yet")
		return
	}
	limit, err := c.number("/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		c.list.Add(name, checklist.Skipped, err.Error())
		return
	}
	text := fmt.Sprintf("%d of %d connections", count, limit)
	if limit > 0 && count*100 > limit*nearlyFull {
		c.list.AddWithRemedy(name, checklist.Warning, text+": a full table drops new connections", "raise net.netfilter.nf_conntrack_max on the node")
		return
	}
	c.list.Add(name, checklist.OK, text)
}

func (c *checker) number(file string) (uint64, error) {
	text, err := os.ReadFile(c.root + file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}

func (c *checker) pair(file string) (first, second uint64, err error) {
	text, err := os.ReadFile(c.root + file)
	if err != nil {
		return 0, 0, err
	}
	_, err = fmt.Sscan(string(text), &first, &second)
	return first, second, err
}
