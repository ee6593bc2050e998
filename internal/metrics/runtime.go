package metrics

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/promtext"
)

// runtimeNames maps Go's names of metrics to those of client_golang. They are few, because each scrape reads them, and all of
// them can be read without stopping the world.
var runtimeNames = map[string]string{
	"/cpu/classes/gc/total:cpu-seconds":   "go_cpu_classes_gc_total_cpu_seconds_total",
	"/gc/gogc:percent":                    "go_gc_gogc_percent",
	"/gc/gomemlimit:bytes":                "go_gc_gomemlimit_bytes",
	"/gc/heap/goal:bytes":                 "go_gc_heap_goal_bytes",
	"/memory/classes/heap/objects:bytes":  "go_memory_classes_heap_objects_bytes",
	"/memory/classes/heap/released:bytes": "go_memory_classes_heap_released_bytes",
	"/memory/classes/heap/stacks:bytes":   "go_memory_classes_heap_stacks_bytes",
	"/memory/classes/total:bytes":         "go_memory_classes_total_bytes",
	"/sched/gomaxprocs:threads":           "go_sched_gomaxprocs_threads",
}

// runtimeMetrics returns the descriptions of runtimeNames that this version of Go has.
var runtimeMetrics = sync.OnceValue(func() (known []metrics.Description) {
	for _, d := range metrics.All() {
		if runtimeNames[d.Name] != "" {
			known = append(known, d)
		}
	}
	return known
})

// goRuntime adds the metrics of Go's runtime.
func (f *families) goRuntime() {
	f.gauge("go_goroutines", "Number of goroutines that currently exist.").is(float64(runtime.NumGoroutine()))
	threads, _ := runtime.ThreadCreateProfile(nil)
	f.gauge("go_threads", "Number of OS threads created.").is(float64(threads))
	f.gauge("go_info", "Information about the Go environment.").is(1, label("version", runtime.Version()))
	f.collections()
	known := runtimeMetrics()
	samples := make([]metrics.Sample, len(known))
	for i := range known {
		samples[i].Name = known[i].Name
	}
	metrics.Read(samples)
	for i, d := range known {
		var value float64
		switch samples[i].Value.Kind() {
		case metrics.KindUint64:
			value = float64(samples[i].Value.Uint64())
		case metrics.KindFloat64:
			value = samples[i].Value.Float64()
		default:
			continue
		}
		kind, help := promtext.Gauge, d.Description+" Sourced from "+d.Name+"."
		if d.Cumulative {
			kind = promtext.Counter
		}
		f.add(runtimeNames[d.Name], strings.ReplaceAll(help, "\n", " "), kind).is(value)
	}
}

// collections adds the metrics of garbage collections.
func (f *families) collections() {
	stats := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&stats)
	pauses := promtext.Metric{Sum: stats.PauseTotal.Seconds(), Count: uint64(stats.NumGC)}
	for i, pause := range stats.PauseQuantiles {
		share := float64(i) / float64(len(stats.PauseQuantiles)-1)
		pauses.Quantiles = append(pauses.Quantiles, promtext.Quantile{Share: share, Value: pause.Seconds()})
	}
	f.add("go_gc_duration_seconds", "A summary of the wall-time pause (stop-the-world) duration in garbage collection cycles.", promtext.Summary).
		observed(pauses, nil)
	f.gauge("go_memstats_last_gc_time_seconds", "Number of seconds since 1970 of last garbage collection.").
		is(float64(stats.LastGC.UnixNano()) / 1e9)
}
