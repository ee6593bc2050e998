package ownport

import (
	"cmp"
	"io"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"runtime/trace"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ProfilesPath is the prefix of the paths that ServeProfile serves.
const ProfilesPath = "/debug/pprof/"

// ServeProfile serves what net/http/pprof serves, except for differences of profiles and for addresses of old formats, whose
// code takes 0.16 MB of the program. A parameter seconds must have been verified: profiles of the CPU and traces take that
// long, by default 30 and 1 seconds.
func ServeProfile(w http.ResponseWriter, r *http.Request) {
	seconds, _ := strconv.ParseFloat(r.FormValue("seconds"), 64)
	d := time.Duration(seconds * float64(time.Second))
	switch which := strings.TrimPrefix(r.URL.Path, ProfilesPath); which {
	case "":
		listProfiles(w)
	case "symbol": // profiles have had their symbols since Go 1.9
		io.WriteString(plain(w), "num_symbols: 0\n")
	case "cmdline":
		io.WriteString(plain(w), strings.Join(os.Args, "\x00"))
	case "profile":
		record(w, r, cmp.Or(d, 30*time.Second), pprof.StartCPUProfile, pprof.StopCPUProfile)
	case "trace":
		record(w, r, cmp.Or(d, time.Second), trace.Start, trace.Stop)
	default:
		writeProfile(w, r, pprof.Lookup(which))
	}
}

func plain(w http.ResponseWriter) http.ResponseWriter {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	return w
}

// record writes what is recorded between start and stop, for a time or until the client leaves.
func record(w http.ResponseWriter, r *http.Request, d time.Duration, start func(io.Writer) error, stop func()) {
	w.Header().Set("Content-Type", "application/octet-stream")
	if err := start(w); err != nil { // another one is recorded
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer stop()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done():
	}
}

// writeProfile writes one of the runtime's profiles: as text with debug=1 or 2, otherwise as a compressed protocol buffer.
// gc=1 collects garbage before a profile of the heap.
func writeProfile(w http.ResponseWriter, r *http.Request, p *pprof.Profile) {
	if p == nil {
		http.Error(w, "unknown profile: "+ProfilesPath+" lists them", http.StatusNotFound)
		return
	}
	if gc, _ := strconv.Atoi(r.FormValue("gc")); gc > 0 && p.Name() == "heap" {
		runtime.GC()
	}
	debug, _ := strconv.Atoi(r.FormValue("debug"))
	if debug != 0 {
		plain(w)
	} else {
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	_ = p.WriteTo(w, debug) // an error means that the client left
}

func listProfiles(w http.ResponseWriter) {
	names := []string{"cmdline", "profile", "symbol", "trace"}
	for _, p := range pprof.Profiles() {
		names = append(names, p.Name())
	}
	slices.Sort(names)
	io.WriteString(plain(w), strings.Join(names, "\n")+"\n")
}
