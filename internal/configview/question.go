package configview

import (
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Values returns the question as the query that ExplainHandler reads.
func (q *Question) Values() url.Values {
	v := url.Values{"url": {q.URL}}
	set := func(name, value string) {
		if value != "" {
			v.Add(name, value)
		}
	}
	set("method", q.Method)
	set("peer", q.Peer)
	if q.Inbound {
		set("from", "inbound")
	}
	if q.Destination.IsValid() {
		set("destination", q.Destination.String())
	}
	if q.Source.IsValid() {
		set("source", q.Source.String())
	}
	for _, f := range q.Fields {
		set("header", f.Name+": "+f.Value)
	}
	return v
}

// parseQuestion is the inverse of Values.
func parseQuestion(v url.Values) (*Question, error) {
	q := &Question{URL: v.Get("url"), Method: v.Get("method"), Peer: v.Get("peer")}
	var err error
	if q.Inbound, err = ParseFrom(v.Get("from")); err != nil {
		return nil, err
	}
	if text := v.Get("destination"); text != "" {
		if q.Destination, err = netip.ParseAddrPort(text); err != nil {
			return nil, fmt.Errorf("destination: %.100q is not an address with a port, such as 198.51.100.7:80", text)
		}
	}
	if text := v.Get("source"); text != "" {
		if q.Source, err = netip.ParseAddr(text); err != nil {
			return nil, fmt.Errorf("source: %.100q is not an address, such as 198.51.100.7", text)
		}
	}
	for _, text := range v["header"] {
		f, err := ParseField(text)
		if err != nil {
			return nil, err
		}
		q.Fields = append(q.Fields, f)
	}
	return q, nil
}

// ParseFrom reports whether text stands for inbound requests.
func ParseFrom(text string) (inbound bool, err error) {
	switch text {
	case "", "outbound":
		return false, nil
	case "inbound":
		return true, nil
	}
	return false, fmt.Errorf("%.50q is not a direction: use outbound or inbound", text)
}

// ParseField returns the header field in a text such as "end-user: jason".
func ParseField(text string) (Field, error) {
	name, value, found := strings.Cut(text, ":")
	if name = strings.TrimSpace(name); !found || name == "" {
		return Field{}, fmt.Errorf("%.100q is not a header field: use \"name: value\"", text)
	}
	return Field{name, strings.TrimSpace(value)}, nil
}

// ExplainHandler serves
//
//	GET /explain?url=URL[&method=GET][&header=NAME: VALUE]…[&from=inbound][&destination=ADDRESS:PORT][&peer=IDENTITY][&source=ADDRESS]
//
// with an Explanation as JSON. A question that is not understood is answered with 400. A nil snapshot stands for an agent
// without a control plane. used may be nil.
func ExplainHandler(snapshot func() *mesh.Snapshot, used InUse) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if snapshot == nil {
			http.Error(w, noControlPlane, http.StatusNotFound)
			return
		}
		q, err := parseQuestion(r.URL.Query())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		explanation, err := Explain(snapshot(), q, used)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		serve(w, explanation)
	})
}
