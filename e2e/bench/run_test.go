package bench

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// measureRunStart measures `pillion run` around a command that does nothing, as an ordinary user, beside unshare, whose
// namespaces are empty.
func measureRunStart(t testing.TB, k *kit, s sizes) []*row {
	r := &row{title: "pillion run -- true; direct: unshare -Urn true", unit: "ms", promises: []promise{{atMost: 60}}}
	inScope(t, func(t testing.TB) {
		pod, _ := nettest.PodAndPeer(t)
		for range s.starts {
			r.add(namePillion, milliseconds(timed(t, pod, k.pillion, "run", "--", "true")))
			r.add(nameDirect, milliseconds(timed(t, pod, "unshare", "-Urn", "true")))
		}
	})
	return []*row{r}
}

// linkRates are the rates of the link to the server of a download, as tc has them. Without one, it is as fast as the machine.
var linkRates = []string{"", "25gbit", "10gbit"}

// measureRunDownload measures a download through `pillion run`, its start and its end included, beside a direct one. Client,
// pillion and server run on any core, as on a user's machine.
func measureRunDownload(t testing.TB, k *kit, s sizes) (rows []*row) {
	for _, rate := range linkRates {
		title := "1 GiB through pillion run, from this machine"
		if rate != "" {
			title = "1 GiB through pillion run, over " + rate + "/s"
		}
		r := &row{title: title, unit: "s", promises: []promise{{1 / 0.9, nameDirect}}}
		inScope(t, func(t testing.TB) { k.downloads(t, s, r, rate) })
		rows = append(rows, r)
	}
	return rows
}

func (k *kit) downloads(t testing.TB, s sizes, r *row, rate string) {
	w := newNamespaces(t, k, contender{name: nameDirect})
	if rate != "" {
		w.peer.MustRun(t, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "1mb", "latency", "20ms")
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(s.bulk))
		chunk := make([]byte, 256<<10)
		for left := s.bulk; left > 0; left -= int64(len(chunk)) {
			w.Write(chunk[:min(left, int64(len(chunk)))])
		}
	})}
	listener := w.peer.Listen(t, "tcp", nettest.PeerIP4.String()+":80")
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	get := []string{"curl", "-sS", "--fail", "--noproxy", "*", "-o", "/dev/null", "http://" + nettest.PeerIP4.String()}
	through := append([]string{k.pillion, "run", "--log", "off", "--"}, get...)
	for round := range s.downloads {
		for i := range 2 {
			if name, words := nameDirect, get; (i+round)%2 == 0 {
				r.add(name, timed(t, w.pod, words...).Seconds())
			} else {
				r.add(namePillion, timed(t, w.pod, through...).Seconds())
			}
		}
	}
	fmt.Fprintf(progress, "%s: pillion %.3f, direct %.3f\n", r.title, r.samples[namePillion], r.samples[nameDirect])
}

// timed returns how long a command takes as an ordinary user.
func timed(t testing.TB, ns *nettest.Namespace, words ...string) time.Duration {
	t.Helper()
	cmd := ns.Command(proxyUser, proxyUser, words[0], words[1:]...)
	cmd.Dir = "/"
	began := time.Now()
	if out, err := ns.Run(cmd); err != nil {
		t.Fatalf("%v: %v\n%s", words, err, out)
	}
	return time.Since(began)
}
