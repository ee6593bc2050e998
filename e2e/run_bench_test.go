package e2e

import (
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// BenchmarkRun measures what `pillion run` adds: the time of a command that does nothing, beside unshare, and the rate of a
// download of 1 GiB, as a share of a direct one. Each is the median of rounds in which they alternate. Run it with
// -benchtime 1x.
func BenchmarkRun(b *testing.B) {
	nettest.RequireRoot(b)
	for _, c := range []caller{{name: "root"}, {name: "user", uid: workloadUID}} {
		b.Run(c.name, func(b *testing.B) {
			c.net, c.peer = nettest.PodAndPeer(b)
			timed := func(cmd *exec.Cmd) time.Duration {
				began := time.Now()
				if out, err := c.net.Run(cmd); err != nil {
					b.Fatalf("%v\n%s", err, out)
				}
				return time.Since(began)
			}
			plain := func(name string, arguments ...string) *exec.Cmd {
				return c.net.Command(c.uid, c.uid, name, arguments...)
			}
			var own, others []time.Duration
			for range 31 {
				own = append(own, timed(plain(pillion, "run", "--", "true")))
				others = append(others, timed(plain("unshare", "-Urn", "true")))
			}
			b.ReportMetric(inMilliseconds(median(own)), "ms/start")
			b.ReportMetric(inMilliseconds(median(others)), "ms/unshare")

			const size = 1 << 30
			serveHTTP(b, c.peer.Listen(b, "tcp", "198.51.100.1:80"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(size))
				chunk := make([]byte, 256<<10)
				for range size / len(chunk) {
					w.Write(chunk)
				}
			}))
			get := []string{"-sS", "--noproxy", "*", "-o", "/dev/null", "http://198.51.100.1/"}
			var direct, carried []time.Duration
			for range 5 {
				direct = append(direct, timed(plain("curl", get...)))
				carried = append(carried, timed(plain(pillion, append([]string{"run", "--log", "off", "--", "curl"}, get...)...)))
			}
			b.ReportMetric(float64(median(direct))/float64(median(carried)), "of_direct_rate")
			b.ReportMetric(size/median(direct).Seconds()/1e9, "direct_GB/s")
		})
	}
}

func median(list []time.Duration) time.Duration {
	slices.Sort(list)
	return list[len(list)/2]
}

func inMilliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
