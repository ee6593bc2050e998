package mesh

import (
	"strings"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Misdirected finds requests whose host belongs to another server of a gateway's port, as opposed to unknown hosts: clients may
// use a connection for several hosts, and its filter chain has the routes of one server only
// (istio.envoy.config.filter.http.misdirected_request.v1alpha1.FilterConfig).
type Misdirected struct {
	Own []string // hosts of the server: exact ones, and "*.example.com" and "*"
	All []string // hosts of all servers of the port
}

// Match reports whether another server is the one for a host in lower case without a port.
func (m *Misdirected) Match(host string) bool {
	return specificity(m.All, host) > specificity(m.Own, host)
}

// specificity returns how specific the best of hosts is for a host: an exact one before the longest wildcard; 0 if no host matches.
func specificity(hosts []string, host string) (best int) {
	for _, pattern := range hosts {
		switch {
		case pattern == host:
			return len(host) + 2
		case pattern == "*":
			best = max(best, 1)
		case strings.HasPrefix(pattern, "*.") && len(host) >= len(pattern) && strings.HasSuffix(host, pattern[1:]):
			best = max(best, len(pattern))
		}
	}
	return best
}

const (
	misdirectedType = "istio.envoy.config.filter.http.misdirected_request.v1alpha1.FilterConfig"

	// The listener's metadata that has the hosts of all servers.
	misdirectedMetadata, misdirectedHosts = "istio.misdirected_request", "hosts"
)

var misdirectedFields = message{misdirectedType, Security, []field{
	1: {"own_hostnames", decoded},
	2: {"listener_metadata_namespace", decoded},
	3: {"hosts_field", decoded},
}}

func (d *decoder) misdirected(m wire.Message, f *HTTPFilter) {
	f.Misdirected = &Misdirected{}
	for d.next(&m, &misdirectedFields) {
		switch text := m.String(); {
		case m.Number == 1:
			f.Misdirected.Own = append(f.Misdirected.Own, text)
		case text != "" && text != misdirectedMetadata && text != misdirectedHosts:
			d.report(Security, "other metadata than "+misdirectedMetadata+" is not supported")
		}
	}
}

// serverHosts returns the hosts in a listener's metadata.
func (d *decoder) serverHosts(m wire.Message) (hosts []string) {
	for d.next(&m, &metadataFields) {
		key, value := d.entry(m.Message())
		if key != misdirectedMetadata {
			continue
		}
		for value.Next() { // fields of a google.protobuf.Struct
			if name, list := d.entry(value.Message()); name == misdirectedHosts {
				hosts = append(hosts, listed(list)...)
			}
		}
	}
	return hosts
}

// listed returns the texts in a google.protobuf.Value that is a list.
func listed(m wire.Message) (texts []string) {
	for m.Next() {
		if m.Number != 6 { // list_value
			continue
		}
		for m := m.Message(); m.Next(); {
			for m := m.Message(); m.Next(); {
				if m.Number == 3 { // string_value
					texts = append(texts, m.String())
				}
			}
		}
	}
	return texts
}

// shareHosts gives the filters of a listener's chains the hosts of all servers.
func (l *Listener) shareHosts(hosts []string) {
	for chain := range l.chains() {
		if chain.HTTP == nil {
			continue
		}
		for i := range chain.HTTP.Filters {
			if m := chain.HTTP.Filters[i].Misdirected; m != nil {
				m.All = hosts
			}
		}
	}
}

// MisdirectedFilter returns the filter of misdirected requests, or nil.
func (h *HTTPManager) MisdirectedFilter() *Misdirected {
	for i := range h.Filters {
		if m := h.Filters[i].Misdirected; m != nil && !h.Filters[i].Disabled {
			return m
		}
	}
	return nil
}
