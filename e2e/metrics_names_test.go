package e2e

import (
	"bytes"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// ownMetric matches names of the agent's metrics in documents and queries.
var ownMetric = regexp.MustCompile(`\b(?:istio|envoy|pillion)_[a-z0-9_]*[a-z0-9]`)

// hasFamilyOf reports whether a name is that of a family or of one of its samples.
func hasFamilyOf(f families, name string) bool {
	if f[name] != nil {
		return true
	}
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if family, ok := strings.CutSuffix(name, suffix); ok && f[family].GetType().String() == "HISTOGRAM" {
			return true
		}
	}
	return false
}

// hasPrefix reports whether the name of a family begins with prefix.
func hasPrefix(f families, prefix string) bool {
	for name := range f {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// An agent that has carried traffic of each kind serves every metric that a document, the dashboard or the list of names
// has, and no other.
func TestDocumentedMetricsAreServed(t *testing.T) {
	t.Parallel()
	program := peer(t, "grpc")
	s := newDNSStage(t, nettest.PeerIP4)
	for _, w := range []way{s.inbound(), s.outbound()} {
		d := newDialogue(t, w, false, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
		text(t, d.do(t, d.request(t, "POST", "/", strings.NewReader("question"))))
		downstream, upstream := w.ask(t, "speaks first")
		reads(t, upstream, "speaks first")
		halfClose(t, downstream, upstream)
	}
	out := s.outbound()
	out.runPeer(t, program, "call", out.startPeer(t, 50051, program, "serve", "ADDRESS"))
	var f families
	nettest.Eventually(t, "requests and connections are counted", func() bool {
		f = s.scrape(t)
		return sample(f, "istio_requests_total") >= 16 && sample(f, "istio_tcp_connections_closed_total") >= 2
	})

	for name, family := range meshMetrics(t) {
		if f[name] == nil {
			f[name] = family
		}
	}

	listed := make(map[string]bool)
	list, err := os.ReadFile("../internal/metrics/testdata/names.golden")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(list)) {
		name, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		kind, _, _ := strings.Cut(rest, " ")
		listed[name] = true
		if strings.HasPrefix(name, withDryRuns) {
			continue
		}
		if f[name] == nil {
			t.Errorf("%s is listed but not served", name)
		} else if got := strings.ToLower(f[name].GetType().String()); got != kind {
			t.Errorf("%s is listed as a %s and served as a %s", name, kind, got)
		}
	}
	for name := range f {
		if !listed[name] && !strings.HasPrefix(name, "go_") {
			t.Errorf("%s is served but not listed", name)
		}
	}
	named := 0
	for _, root := range []string{"../README.md", "../docs", "../deploy"} {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			switch filepath.Ext(path) {
			case ".md", ".json", ".yaml", ".yml":
			default:
				return err
			}
			content, err := os.ReadFile(path)
			for _, at := range ownMetric.FindAllIndex(content, -1) {
				name := string(content[at[0]:at[1]])
				if strings.HasPrefix(name, "istio_dry_run") { // dynamic metadata of policies
					continue
				}
				if named++; bytes.HasPrefix(content[at[1]:], []byte("_")) { // stands for all names that begin so
					if !hasPrefix(f, name+"_") && name+"_" != withDryRuns {
						t.Errorf("%s names %s_…, but no such metric is served", path, name)
					}
				} else if !hasFamilyOf(f, name) && notOfTheMetricsPort[name] == "" {
					t.Errorf("%s names %s, but it is not served", path, name)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if named < 40 {
		t.Errorf("the documents name %d metrics: too few: the pattern does not match", named)
	}
}

// meshMetrics returns the metrics of an agent with a control plane and an identity.
func meshMetrics(t *testing.T) families {
	t.Helper()
	s, control := newMeshStage(t)
	control.start(t, "PERMISSIVE")
	awaitReady(t, s.pod, s.agent)
	s.agent.log.await(t, "workload certificate renewed")
	return s.scrape(t)
}

// withDryRuns begins the names of families that a port has from its first dry run of a policy on. Tests of internal/metrics have
// such a port.
const withDryRuns = "envoy_http_inbound_0_0_0_0_"

// notOfTheMetricsPort are names that look like a metric's but are not one of the metrics port's.
var notOfTheMetricsPort = map[string]string{
	"pillion_scrape_target_up":      "served at the status port, for each target of the workload",
	"pillion_scrape_dropped_series": "likewise",
	"envoy_internal_address":        "a field of Envoy's addresses",
}
