package admin

import (
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/ownport"
)

// object is a protobuf message in JSON, with the original field names, as Envoy prints it. Keys are sorted.
type object map[string]any

func (h *handler) ready(w http.ResponseWriter, _ *http.Request) {
	code := http.StatusOK
	state, ok := h.Ready()
	if !ok {
		code = http.StatusServiceUnavailable
	}
	answer(w, code, state+"\n")
}

func (h *handler) serverInfo(w http.ResponseWriter, _ *http.Request) {
	state, _ := h.Ready()
	uptime := duration(time.Since(h.Started).Truncate(time.Second))
	answerJSON(w, object{
		"version":              h.Version,
		"state":                state,
		"uptime_current_epoch": uptime,
		"uptime_all_epochs":    uptime,
		"hot_restart_version":  "disabled",
		"command_line_options": object{
			"concurrency":         h.Options.Concurrency,
			"log_level":           h.Options.LogLevel,
			"drain_time":          duration(h.Options.DrainTime),
			"drain_strategy":      "Immediate", // every response closes its connection
			"disable_hot_restart": true,
			"mode":                "Serve",
			"service_cluster":     h.Node.Cluster,
			"service_node":        h.Node.ID,
		},
		"node": h.node(),
	})
}

func (h *handler) node() object {
	metadata := map[string]any{"ISTIO_PROXY_SHA": "pillion:" + h.Version} // istioctl prints what follows the colon
	maps.Copy(metadata, h.Node.Metadata)
	return object{
		"id": h.Node.ID, "cluster": h.Node.Cluster, "metadata": metadata,
		"user_agent_name": "pillion", "user_agent_build_version": buildVersion(h.Version),
	}
}

var numbers = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})(?:-(.+))?$`) })

// buildVersion returns a version such as v1.2.3-4-g642d4a8 as Envoy's BuildVersion. istioctl prints it as
// 1.2.3-pillion-4-g642d4a8. The version of a build without a tag is a commit; its numbers are 0.
func buildVersion(version string) object {
	number, label := object{}, "pillion"
	if parts := numbers().FindStringSubmatch(version); parts != nil {
		for i, field := range []string{"major_number", "minor_number", "patch"} {
			number[field], _ = strconv.Atoi(parts[i+1])
		}
		version = parts[4]
	}
	if version != "" {
		label += "-" + version
	}
	return object{"version": number, "metadata": object{"build.label": label}}
}

func (h *handler) initDump(w http.ResponseWriter, _ *http.Request) {
	dumps := []object{}
	if h.Unready != nil {
		if targets := h.Unready(); len(targets) > 0 {
			dumps = append(dumps, object{"name": "readiness", "target_names": targets})
		}
	}
	if h.ControlPlane != nil {
		dumps = append(dumps, warmingTargets(h.ControlPlane.Resources())...)
	}
	answerJSON(w, object{"unready_targets_dumps": dumps})
}

// memory fills Envoy's fields with the Go runtime's metrics. runtime.ReadMemStats would stop the world; these do not.
func (h *handler) memory(w http.ResponseWriter, _ *http.Request) {
	names := []string{"objects:bytes", "unused:bytes", "free:bytes", "released:bytes"}
	samples := make([]metrics.Sample, len(names), len(names)+1)
	for i, name := range names {
		samples[i].Name = "/memory/classes/heap/" + name
	}
	samples = append(samples, metrics.Sample{Name: "/memory/classes/total:bytes"})
	metrics.Read(samples)
	value := func(i int) uint64 { return samples[i].Value.Uint64() }
	answerJSON(w, object{ // 64-bit numbers are strings in JSON
		"allocated":            strconv.FormatUint(value(0), 10),
		"heap_size":            strconv.FormatUint(value(0)+value(1)+value(2), 10),
		"pageheap_free":        strconv.FormatUint(value(2), 10),
		"pageheap_unmapped":    strconv.FormatUint(value(3), 10),
		"total_physical_bytes": strconv.FormatUint(value(4)-value(3), 10),
	})
}

func (h *handler) drain(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	order := DrainOrder{InboundOnly: query.Has("inboundonly"), Graceful: query.Has("graceful"), SkipExit: query.Has("skip_exit")}
	if order.SkipExit && !order.Graceful {
		refuse(w, "skip_exit requires graceful")
		return
	}
	if h.Drain == nil {
		notSupported(w)
		return
	}
	h.Drain(order)
	answer(w, http.StatusOK, "OK\n")
}

func (h *handler) healthcheck(w http.ResponseWriter, r *http.Request) {
	if h.Health == nil {
		notSupported(w)
		return
	}
	h.Health(strings.HasSuffix(r.URL.Path, "/ok"))
	answer(w, http.StatusOK, "OK\n")
}

func (h *handler) reopenLogs(w http.ResponseWriter, _ *http.Request) {
	if h.ReopenLogs == nil {
		notSupported(w)
		return
	}
	h.ReopenLogs()
	answer(w, http.StatusOK, "OK\n")
}

func (h *handler) recentLog(w http.ResponseWriter, _ *http.Request) {
	if h.RecentLog == nil {
		notSupported(w)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	h.RecentLog.WriteTo(w) // an error means that the client left
}

func notSupported(w http.ResponseWriter) {
	answer(w, http.StatusNotImplemented, "this agent does not support this command\n")
}

// quit responds first, because the process may exit at once.
func (h *handler) quit(w http.ResponseWriter, _ *http.Request) {
	if h.Quit == nil {
		notSupported(w)
		return
	}
	answer(w, http.StatusOK, "OK\n")
	_ = http.NewResponseController(w).Flush() // an error means that the client left
	h.Quit()
}

// maxProfile bounds the seconds of a profile, because it holds a slot meanwhile.
const maxProfile = 300

func (h *handler) profile(w http.ResponseWriter, r *http.Request) {
	if text := r.FormValue("seconds"); text != "" {
		if seconds, err := strconv.ParseFloat(text, 64); err != nil || !(seconds >= 0 && seconds <= maxProfile) {
			refuse(w, "seconds=%.50q: use a number up to %d", text, maxProfile)
			return
		}
	}
	ownport.ServeProfile(w, r)
}

// duration returns d as a protobuf duration in JSON.
func duration(d time.Duration) string {
	return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s"
}

// wantsJSON reads format=. If the value is neither text nor json, it writes the response and returns ok false.
func wantsJSON(w http.ResponseWriter, r *http.Request) (wants, ok bool) {
	switch format := r.URL.Query().Get("format"); format {
	case "", "text":
		return false, true
	case "json":
		return true, true
	default:
		refuse(w, "format=%.50q: use text or json", format)
		return false, false
	}
}

func (h *handler) listeners(w http.ResponseWriter, r *http.Request) {
	asJSON, ok := wantsJSON(w, r)
	if !ok {
		return
	}
	if !asJSON {
		var b strings.Builder
		for _, l := range h.Listeners() {
			for _, address := range l.Addresses {
				fmt.Fprintf(&b, "%s::%s\n", l.Name, address)
			}
		}
		answer(w, http.StatusOK, b.String())
		return
	}
	statuses := []object{}
	for _, l := range h.Listeners() {
		status := object{"name": l.Name}
		for i, address := range l.Addresses {
			if i == 0 {
				status["local_address"] = socketAddress(address)
			} else {
				others, _ := status["additional_local_addresses"].([]object)
				status["additional_local_addresses"] = append(others, socketAddress(address))
			}
		}
		statuses = append(statuses, status)
	}
	answerJSON(w, object{"listener_statuses": statuses})
}
