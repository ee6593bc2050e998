package arch

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// arrows are the imports that are allowed inside the module; they go down only. A room without an entry imports no other
// room.
var arrows = []struct {
	from string
	to   []string
	why  string
}{
	{"cmd/pillion", []string{"agent", "healthz", "iptables", "iptables/kernel", "iptables/report", "iptables/validate", "run", "internal/capture", "internal/certview", "internal/checklist", "internal/commandline", "internal/configview", "internal/edge", "internal/egress", "internal/fault", "internal/httpforward", "internal/identity", "internal/istiod", "internal/live", "internal/logring", "internal/netns", "internal/ownport", "internal/podinfo", "internal/preflight", "internal/proxyconfig", "internal/sandbox", "internal/terminal", "internal/tracing"},
		"flags become configuration; everything else is decided below"},
	{"agent", []string{"gateway", "healthz", "inbound", "outbound", "internal/accesslog", "internal/admin", "internal/balance", "internal/budget", "internal/capture", "internal/cel", "internal/certview", "internal/configdump", "internal/configview", "internal/controlplane", "internal/dns", "internal/edge", "internal/egress", "internal/export", "internal/flow", "internal/httpforward", "internal/istiod", "internal/listener", "internal/live", "internal/localaddr", "internal/mesh", "internal/metrics", "internal/ownport", "internal/peers", "internal/podinfo", "internal/probe", "internal/relay", "internal/scrape", "internal/serve", "internal/status", "internal/tcp", "internal/tracing", "internal/upstream", "internal/xds"},
		"the agent builds all parts and stops them in order"},
	{"run", []string{"outbound", "internal/budget", "internal/capture", "internal/datagram", "internal/dns", "internal/egress", "internal/fault", "internal/flow", "internal/httpforward", "internal/identity", "internal/listener", "internal/live", "internal/sandbox", "internal/secure", "internal/serve", "internal/tcp", "internal/terminal", "internal/upstream"},
		"a command's traffic arrives from a sandbox, is carried by a role and a resolver, and is shown in a terminal"},
	{"internal/sandbox", []string{"internal/capture", "internal/datagram", "internal/prestart", "internal/sockopt", "iptables/kernel", "iptables/nft"},
		"a sandbox captures ports by a table of its own, its link has the address that packets are sent to, its listening sockets have the options of accepted ones, and its first process may be started before the program is initialized"},
	{"internal/datagram", []string{"internal/flow"},
		"the counters of a flow that is listed"},
	{"inbound", []string{"internal/balance", "internal/capture", "internal/envoy", "internal/flow", "internal/httpforward", "internal/serve", "internal/tcp", "internal/upstream", "internal/peers", "internal/tracing"},
		"a direction orders steps that it shares with the other, and decides where connections go; the directions never import each other"},
	{"outbound", []string{"internal/balance", "internal/envoy", "internal/fault", "internal/flow", "internal/httpforward", "internal/peers", "internal/serve", "internal/tcp", "internal/upstream", "internal/tracing"},
		"a direction orders steps that it shares with the other, and decides where connections go; the directions never import each other"},
	{"gateway", []string{"internal/balance", "internal/flow", "internal/httpforward", "internal/listener", "internal/mesh", "internal/peers", "internal/serve", "internal/tcp", "internal/tracing", "internal/upstream"},
		"a role of its own: it orders the same steps for connections that were accepted at a configured listener"},
	{"internal/serve", []string{"internal/authz", "internal/balance", "internal/budget", "internal/callout", "internal/capture", "internal/envoy", "internal/extauthz", "internal/fault", "internal/flow", "internal/httpforward", "internal/identity", "internal/jwks", "internal/jwt", "internal/match", "internal/mesh", "internal/peers", "internal/relay", "internal/route", "internal/secure", "internal/sniff", "internal/tcp", "internal/upstream", "internal/urlpath", "internal/tracing"},
		"the steps of a connection: wait for the configuration, detect its protocol, end TLS, dial, hand it to an engine or the relay, close its record"},
	{"iptables", []string{"internal/capture", "iptables/kernel", "iptables/nft", "iptables/policy", "iptables/ruleset", "iptables/xtables"},
		"a plan is the difference between the policy's rules and the installed ones, carried out by a back end"},
	{"iptables/report", []string{"internal/capture", "iptables", "iptables/kernel", "iptables/ruleset", "iptables/trace"},
		"a report describes rules, plans and a packet's path"},
	{"iptables/validate", []string{"internal/capture", "iptables", "iptables/kernel", "iptables/policy", "iptables/ruleset", "iptables/trace"},
		"the connections that must be captured are found by tracing the policy's rules"},
	{"iptables/policy", []string{"internal/capture", "iptables/ruleset"}, "rules follow from what is captured"},
	{"iptables/trace", []string{"iptables/ruleset"}, "a packet walks through rules"},
	{"iptables/xtables", []string{"iptables/kernel", "iptables/ruleset"}, "rules become the input of a program; its errors have causes in the kernel"},
	{"iptables/nft", []string{"internal/capture", "iptables/kernel", "iptables/ruleset"}, "rules become expressions; refusals have causes in the kernel"},
	{"iptables/kernel", []string{"internal/capture", "iptables/ruleset"}, "addresses and routes belong to a family, and follow from what is captured"},
	{"iptables/ruleset", []string{"internal/capture"}, "a rule matches ranges of ports, users and groups"},
	{"iptables/rulestest", []string{"internal/capture", "internal/nettest", "iptables/ruleset", "iptables/trace"},
		"the packages of the rules share scenarios and namespaces in their tests"},
	{"internal/ownport", []string{"internal/capture"}, "the source address of connections that inbound dials is not local"},
	{"internal/probe", []string{"internal/capture", "internal/envoy", "internal/http2", "internal/ownport", "internal/sockopt"},
		"a probe comes from the address that the rules let pass; one of gRPC is a few frames of HTTP/2"},
	{"internal/status", []string{"internal/ownport"}, "a handler may need more time than its server gives, and loopback is not always local"},
	{"internal/tcp", []string{"internal/budget", "internal/sockopt"}, "a socket is born with its options; what a record layer holds while it waits is in the process's budget"},
	{"internal/dns", []string{"internal/sockopt"}, "the kernel counts the queries that it drops at a socket"},
	{"internal/metrics", []string{"internal/cel", "internal/dns", "internal/envoy", "internal/flow", "internal/mesh", "internal/podinfo", "internal/promtext"},
		"a control plane changes labels, by expressions; records are counted, under the names of this workload, and written; the resolver counts itself"},
	{"internal/sniff", []string{"internal/budget", "internal/flow", "internal/http2", "internal/tcp"},
		"read bytes stay in a buffer whose memory is accounted for, findings go into the record; http2 recognises a server's first frame"},
	{"internal/balance", []string{"internal/envoy", "internal/flow", "internal/mesh", "internal/tcp", "internal/xxh64"},
		"hosts are chosen as a cluster configures, and connections to one are retired together; how a request ended counts for its host, a status of gRPC as one of HTTP"},
	{"internal/httpforward", []string{"internal/balance", "internal/budget", "internal/envoy", "internal/flow", "internal/http1", "internal/http2", "internal/mesh", "internal/relay", "internal/route", "internal/tcp", "internal/tracing", "internal/upstream", "internal/peers"},
		"an engine uses a codec, upstream connections and records, and accounts for its memory; it carries out a route's plan, with a mesh's retry policy, and reports its outcome; an upgraded connection is relayed; its responses use Envoy's terms"},
	{"internal/flow", []string{"internal/envoy"}, "each reason has its response flags and details"},
	{"internal/relay", []string{"internal/tcp"}, "the relay waits for two connections at once"},
	{"internal/listener", []string{"internal/tcp"}, "the accept loop hands connections on"},
	{"internal/upstream", []string{"internal/flow", "internal/tcp"}, "a failed dial has a reason"},
	{"internal/scrape", []string{"internal/promtext"}, "scraped metrics are parsed, merged and written"},
	{"internal/accesslog", []string{"internal/cel", "internal/envoy", "internal/export", "internal/flow", "internal/match", "internal/mesh", "internal/wire"}, "a line prints a record; a control plane configures formats, as protobuf, filters, as expressions, and services that get records"},
	{"internal/cel", []string{"internal/envoy", "internal/flow"}, "expressions judge records; response flags have Envoy's numbers"},
	{"internal/admin", []string{"internal/configdump", "internal/envoy", "internal/flow", "internal/ownport", "internal/promtext"},
		"metrics are written; open connections come from the table; resources of a control plane are printed from their bytes; local clients are recognised in one place; the rest are values"},
	{"internal/commandline", []string{"internal/capture"}, "an error repeats a value cut at the same length everywhere"},
	{"internal/preflight", []string{"internal/capture", "internal/checklist", "internal/live", "internal/netns", "iptables", "iptables/kernel"},
		"rules are tried in a namespace of their own; the agent reports its state as the live view"},
	{"internal/terminal", []string{"internal/configview", "internal/live", "internal/certview"}, "the terminal prints values of the live view, and of what is configured"},
	{"internal/configview", []string{"internal/authz", "internal/controlplane", "internal/envoy", "internal/jwt", "internal/mesh", "internal/route", "internal/urlpath", "internal/xds"},
		"objects in short are compiled from the resources of a control plane; a request is explained by the code that finds its route and judges it"},
	{"internal/live", []string{"internal/flow", "internal/ownport"}, "the view is built from records, and serves local clients only"},
	{"internal/certificate", []string{"internal/kubeapi"}, "an authority is published by requests to the API server"},
	{"internal/clustercheck", []string{"internal/checklist", "internal/kubeapi"}, "checks are requests to the API server"},
	{"cmd/pillionctl", []string{"internal/certificate", "internal/clustercheck", "internal/commandline", "internal/inject", "internal/kubeapi"}, "the operator's program; its dependencies do not belong into a sidecar"},
	{"internal/inject", []string{"internal/accesslog", "internal/capture", "internal/podinfo", "internal/probe", "internal/scrape", "internal/yamledit"},
		"values for init and agent are checked by the code that reads them"},
	{"internal/serve/servetest", []string{"internal/capture", "internal/flow", "internal/httpforward", "internal/identity", "internal/localaddr", "internal/mesh", "internal/nettest", "internal/serve", "internal/tcp", "internal/upstream"},
		"roles are tested in namespaces, with real parts"},
	{"internal/tcp/layertest", []string{"internal/tcp"}, "a toy layer is put under real connections"},
	{"internal/xds", []string{"internal/envoy", "internal/wire"}, "discovery messages are read field by field; a rejection is a status of gRPC"},
	{"internal/identity", []string{"internal/envoy", "internal/grpcwire", "internal/wire"}, "a CA and a workload socket are asked by calls, and their status decides whether to ask again"},
	{"internal/mesh", []string{"internal/cel", "internal/envoy", "internal/wire"}, "resources are read field by field, and expressions in them are parsed; tags of spans name verdicts as Envoy does"},
	{"internal/callout", []string{"internal/balance", "internal/flow", "internal/grpcwire", "internal/mesh"}, "the agent's own requests go to endpoints of clusters, by HTTP or gRPC, and their outcome has a reason"},
	{"internal/extauthz", []string{"internal/callout", "internal/flow", "internal/match", "internal/mesh", "internal/route", "internal/wire"}, "a server is asked as a filter configures; its answer is edits and a reply"},
	{"internal/jwks", []string{"internal/callout", "internal/jwt", "internal/mesh"}, "keys of tokens are fetched from where a provider names"},
	{"internal/match", []string{"internal/mesh"}, "matchers are compiled from the values of a control plane"},
	{"internal/jwt", []string{"internal/flow", "internal/match", "internal/mesh", "internal/route"}, "a filter is compiled from the values of a control plane; it looks at requests as routes do, and replies in their form"},
	{"internal/authz", []string{"internal/match", "internal/mesh"}, "policies are compiled from the values of a control plane"},
	{"internal/route", []string{"internal/envoy", "internal/flow", "internal/match", "internal/mesh", "internal/xxh64"}, "routes of a control plane are compiled, and compared with metadata; replies have reasons, and Envoy's flags and details; requests are hashed as by Envoy"},
	{"internal/controlplane/pushtest", []string{"internal/wire", "internal/xds"}, "recorded pushes are updates"},
	{"internal/certview", []string{"internal/flow", "internal/identity", "internal/mesh", "internal/secure"}, "certificates are described, and servers verified, as on connections"},
	{"internal/peers", []string{"internal/flow", "internal/wire"}, "a description is a protobuf message, and becomes the workload of a record"},
	{"internal/secure/securetest", []string{"internal/identity", "internal/wire"}, "test certificates are identities, and secrets as the control plane encodes them"},
	{"internal/secure", []string{"internal/budget", "internal/identity", "internal/match", "internal/mesh", "internal/tcp", "internal/peers", "internal/flow"}, "TLS is a layer of a connection, and its handshakes are in the memory budget; peers are verified with the roots of the identity, by names that the mesh configures"},
	{"internal/configdump", []string{"internal/wire"}, "descriptions of messages are read field by field"},
	{"internal/controlplane", []string{"internal/identity", "internal/istiod", "internal/mesh", "internal/wire", "internal/xds"},
		"resources are compiled as they are received, and kept as protobuf; a session with istiod has a stream and an identity"},
	{"internal/istiod", []string{"internal/grpcwire", "internal/identity", "internal/wire"}, "istiod is called over one connection, verified by roots in a file, by a node that is described in protobuf"},
	{"internal/grpcwire", []string{"internal/envoy"}, "the table of gRPC's codes"},
	{"internal/export", []string{"internal/envoy", "internal/grpcwire", "internal/mesh", "internal/wire"}, "spans and records are sent to the receivers that a control plane names, as protobuf, by HTTP or gRPC"},
	{"internal/tracing", []string{"internal/export", "internal/flow", "internal/mesh", "internal/wire"}, "spans are made of records, as a control plane may configure, and exported"},
	{"internal/edge", []string{"internal/capture", "internal/identity", "internal/mesh", "internal/proxyconfig"},
		"settings become the values of a control plane; files are read with a bound, and a line as in Istio's configuration"},
	{"internal/nettest", []string{"internal/netns"}, "test namespaces are entered the safe way"},
	{"internal/egress", []string{"internal/capture"}, "a rule has a port, and its error repeats a value cut at the same length"},
	{"internal/fault", []string{"internal/egress"}, "a fault is for the hosts that a rule selects"},
}

func TestImportsFollowTheArrows(t *testing.T) {
	imports := make(map[[2]string]bool)
	for _, r := range rooms(t) {
		for _, imported := range r.Imports {
			to, ours := strings.CutPrefix(imported, module)
			imports[[2]string{r.path(), to}] = true
			if !ours || allowed(r.path(), to) || testOnly(r.path()) {
				continue
			}
			t.Errorf("%s imports %s: no arrow allows it. Share a step below both, or add the arrow with its reason.", r.path(), to)
		}
	}
	for _, arrow := range arrows {
		for _, to := range arrow.to {
			if !imports[[2]string{arrow.from, to}] {
				t.Errorf("%s does not import %s: take the arrow out", arrow.from, to)
			}
		}
	}
}

func allowed(from, to string) bool {
	for _, arrow := range arrows {
		if within(from, arrow.from) && slices.Contains(arrow.to, to) {
			return true
		}
	}
	return false
}

// testOnly reports whether a room is not part of any program. Such rooms may import everything.
func testOnly(path string) bool {
	return within(path, "e2e/...") || within(path, "internal/arch")
}

func TestEveryArrowHasAReasonAndPointsAtARoom(t *testing.T) {
	seen := make(map[string]bool)
	for _, arrow := range arrows {
		if arrow.why == "" {
			t.Errorf("the arrow from %s has no reason", arrow.from)
		}
		if seen[arrow.from] {
			t.Errorf("%s has two entries in the table", arrow.from)
		}
		seen[arrow.from] = true
		for _, to := range arrow.to {
			if roles := []string{"gateway", "inbound", "outbound"}; slices.Contains(roles, arrow.from) && slices.Contains(roles, to) {
				t.Errorf("%s → %s: the roles never import each other", arrow.from, to)
			}
		}
	}
}

// testRoom reports whether only tests may import a room. Its code counts as test code.
func testRoom(path string) bool {
	return path == "internal/nettest" || path == "iptables/rulestest" || path == "internal/serve/servetest" || path == "internal/tcp/layertest"
}

func TestOnlyTestsUseTheTestRooms(t *testing.T) {
	for _, r := range rooms(t) {
		for _, imported := range r.Imports {
			if test := strings.TrimPrefix(imported, module); testRoom(test) && !testRoom(r.path()) && !testOnly(r.path()) {
				t.Errorf("%s imports %s outside its tests: programs do not contain test code", r.path(), test)
			}
		}
	}
}

// A sidecar runs in every pod, so it does not contain code that only the operator needs.
func TestTheSidecarDoesNotContainTheInjector(t *testing.T) {
	out, err := command("go", "list", "-deps", "./cmd/pillion")
	if err != nil {
		t.Fatal(err)
	}
	for path := range strings.Lines(out) {
		if path = strings.TrimSpace(path); path == module+"internal/inject" || strings.Contains(path, "yaml") {
			t.Errorf("cmd/pillion contains %s", path)
		}
	}
}

// rawCalls are the rooms that may make raw system calls, and why.
var rawCalls = map[string]string{
	"internal/sockopt":   "original destinations and the other socket options",
	"internal/tcp":       "connections that never block, and the epoll set that watches them",
	"internal/relay":     "the pipes that splice needs",
	"internal/accesslog": "writes that must not wait, past the scheduler",
	"agent":              "unmapping the program's pages after the start; policies of threads; whether a directory is in memory",
	"internal/localaddr": "netlink groups that announce addresses",
	"internal/nettest":   "namespaces and links for tests",
	"iptables/nft":       "nftables by netlink",
	"iptables/kernel":    "capabilities, and the constants of addresses and routes",
	"iptables/validate":  "sockets of other users that prove the rules",
	"internal/preflight": "limits of the process",
	"internal/datagram":  "datagrams with their addresses and ICMP errors, which package net does not return",
	"internal/sandbox":   "namespaces, rules and capabilities of a command, and its terminal",
	"internal/prestart":  "a process in new namespaces, before packages with these calls are initialized",
	"internal/terminal":  "the size of a terminal, and its keys one by one",
	"iptables/rulestest": "sockets with addresses that are not the machine's",
}

// unsafeRooms may use unsafe, most of them to pass memory to the kernel.
var unsafeRooms = map[string]string{
	"internal/accesslog":   "writes past the scheduler",
	"internal/httpforward": "a router reads the fields of a header block, which are strings, without a copy",
	"internal/prestart":    "capabilities, before golang.org/x/sys is initialized",
	"internal/sandbox":     "actions of signals, which package os/signal sets in another way",
	"internal/sockopt":     "socket options past the scheduler",
	"internal/tcp":         "system calls past the scheduler",
}

// The names of errors (unix.ECONNREFUSED) are not calls; every room may use them.
func TestRawSystemCallsStayInTheRoomsThatOwnThem(t *testing.T) {
	for _, r := range rooms(t) {
		if slices.Contains(r.Imports, "unsafe") && unsafeRooms[r.path()] == "" {
			t.Errorf("%s imports unsafe", r.path())
		}
		if rawCalls[r.path()] != "" || testOnly(r.path()) {
			continue
		}
		var used []string
		own, _ := r.files()
		for _, name := range own {
			used = append(used, selected(parse(t, name), "unix")...)
		}
		used = slices.DeleteFunc(used, errorName.MatchString)
		if slices.Sort(used); len(used) > 0 {
			t.Errorf("%s uses unix.%s: put the call into the room that owns it (internal/sockopt for sockets), or add the room with its reason",
				r.path(), strings.Join(slices.Compact(used), ", unix."))
		}
	}
}

var errorName = regexp.MustCompile(`^E[A-Z0-9]+$|^Errno$`)
