package certview

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/identity"
)

// Source is the session that has the workload's identity.
type Source interface {
	Identity() *identity.Identity // nil before the first one
	Certificates() Status
}

// Handler serves
//
//	GET  /identity            an Identity
//	POST /identity/handshake  a Handshake with the workload's identity; see ParseOptions for the query
//
// A nil source stands for an agent without an identity, and every request is answered with 404 and the reason.
func Handler(source Source) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case source == nil:
			http.Error(w, "this agent has no identity: set --control-plane", http.StatusNotFound)
		case r.URL.Path == "/identity":
			serve(w, Describe(source.Identity(), source.Certificates()))
		case r.URL.Path == "/identity/handshake":
			shake(w, r, source)
		default:
			http.NotFound(w, r)
		}
	})
}

func shake(w http.ResponseWriter, r *http.Request, source Source) {
	o, err := ParseOptions(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if i := source.Identity(); i != nil {
		o.OfIdentity(i)
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(o.Timeout + 2*rejectTime + time.Second)) // not every writer has one
	serve(w, Shake(r.Context(), o))
}

// ParseOptions reads options from a query: to (host:port), and optionally sni, alpn (a list with commas), expect and timeout.
func ParseOptions(query map[string][]string) (o Options, err error) {
	get := func(name string) string {
		if values := query[name]; len(values) > 0 {
			return values[0]
		}
		return ""
	}
	o = Options{Address: get("to"), ServerName: get("sni"), Expect: get("expect"), Timeout: DefaultTimeout}
	if host, port, err := net.SplitHostPort(o.Address); err != nil || host == "" || port == "" {
		return o, fmt.Errorf("to=%q: use HOST:PORT", o.Address)
	}
	if alpn := get("alpn"); alpn != "" {
		o.ALPN = strings.Split(alpn, ",")
	}
	if text := get("timeout"); text != "" {
		if o.Timeout, err = time.ParseDuration(text); err != nil || o.Timeout <= 0 || o.Timeout > MaxTimeout {
			return o, fmt.Errorf("timeout=%q: use a duration of at most %v", text, MaxTimeout)
		}
	}
	return o, nil
}

func serve(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value) // an error means that the client left
}
