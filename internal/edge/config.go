// Package edge is the configuration of a gateway without a control plane: a few settings of flags or of a file become the
// values that a control plane would send, in a snapshot that a role obeys. Files are read again when they change.
package edge

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/proxyconfig"
)

// Config is what a gateway does. Set fills it.
type Config struct {
	Listen       []netip.AddrPort // of the traffic; without an address it is all addresses
	Redirect     []netip.AddrPort // of plain requests that are redirected to the first port of Listen
	Proxied      bool             // connections begin with a header of the PROXY protocol
	Certificates []string         // files of PEM; without them the traffic of Listen is plain
	Keys         []string         // likewise, of the certificates in their order
	Routes       []Route
}

// Route is where the requests for a host and a prefix of the path go.
type Route struct {
	Host   string // a name, "*." and a domain for all names below it, or "*" for all hosts
	Prefix string // of whole segments; "/" for all paths
	To     []mesh.Endpoint

	text string // of To, as it was set
}

func (r *Route) name() string { return r.Host + strings.TrimSuffix(r.Prefix, "/") }

// Setting is one of the settings. It may be set more than once.
type Setting struct {
	Name, Kind, Usage string

	set func(c *Config, value string) error
}

// Settings are all settings, by the names that they have as flags and in a file.
var Settings = []Setting{
	{"listen", "[address:]port", "port at which the gateway listens, on all addresses or on one; several are separated by commas", func(c *Config, value string) (err error) {
		c.Listen, err = appendPorts(c.Listen, value)
		return err
	}},
	{"cert", "path", "PEM file of a certificate with its chain; clients are then served by HTTPS. Of several, a client gets one for the name that it asks for, otherwise the first", func(c *Config, value string) error {
		return appendPath(&c.Certificates, value)
	}},
	{"key", "path", "PEM file of the certificate's key; the first key is that of the first certificate, and so on", func(c *Config, value string) error {
		return appendPath(&c.Keys, value)
	}},
	{"redirect-http", "[address:]port", "port at which plain HTTP is redirected to the first port of --listen by HTTPS", func(c *Config, value string) (err error) {
		c.Redirect, err = appendPorts(c.Redirect, value)
		return err
	}},
	{"proxy-protocol", "bool", "connections begin with a header of the PROXY protocol, version 1 or 2, from a load balancer: the client's address is that in it. Others are reset", func(c *Config, value string) (err error) {
		if c.Proxied, err = strconv.ParseBool(value); err != nil {
			err = fmt.Errorf("%s is not a boolean: use true or false", capture.Quoted(value))
		}
		return err
	}},
	{"route", "host[/prefix]=address[,address...]", "where requests for a host go, and by a prefix of the path: to HOST:PORT, by name or address; of several prefixes the longest counts. *.example.com is each name below, * every other host", func(c *Config, value string) error {
		r, err := parseRoute(value)
		c.Routes = append(c.Routes, r)
		return err
	}},
}

// Set adds a value of a setting.
func (s *Setting) Set(c *Config, value string) error { return s.set(c, value) }

func appendPath(paths *[]string, value string) error {
	if value == "" {
		return errors.New("is empty: name a file")
	}
	*paths = append(*paths, value)
	return nil
}

func appendPorts(ports []netip.AddrPort, value string) ([]netip.AddrPort, error) {
	for item := range strings.SplitSeq(value, ",") {
		var address netip.Addr
		text := item
		if i := strings.LastIndexByte(item, ':'); i >= 0 {
			var ok bool
			if address, ok = parseAddress(item[:i]); !ok {
				return nil, fmt.Errorf("%s is not an address: use PORT, ADDRESS:PORT or [ADDRESS]:PORT", capture.Quoted(item[:i]))
			}
			text = item[i+1:]
		}
		port, err := capture.ParsePort(text)
		if err != nil {
			return nil, err
		}
		ports = append(ports, netip.AddrPortFrom(address, port))
	}
	return ports, nil
}

// parseAddress returns false for a text that is not an address. Those of IPv6 are in brackets.
func parseAddress(text string) (netip.Addr, bool) {
	inner := strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	address, err := netip.ParseAddr(inner)
	return address.Unmap(), err == nil && address.Is6() == (len(inner) == len(text)-2)
}

func parseRoute(value string) (r Route, err error) {
	from, to, found := strings.Cut(value, "=")
	if !found {
		return r, errors.New("has no address: use HOST=ADDRESS:PORT, such as shop.example=10.0.0.1:8080")
	}
	host, path, _ := strings.Cut(from, "/")
	r.Host, r.Prefix, r.text = strings.ToLower(host), "/"+strings.Trim(path, "/"), to
	name := strings.TrimPrefix(r.Host, "*.")
	if name != "*" && (name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "") {
		return r, fmt.Errorf("%s is not a host: use a name without a port such as shop.example, *.shop.example, or * for every other host", capture.Quoted(host))
	}
	if strings.ContainsAny(path, "?#* ") {
		return r, fmt.Errorf("%s is not a prefix of a path: use one such as /api", capture.Quoted(r.Prefix))
	}
	for item := range strings.SplitSeq(to, ",") {
		endpoint, err := parseEndpoint(item)
		if err != nil {
			return r, err
		}
		r.To = append(r.To, endpoint)
	}
	return r, nil
}

func parseEndpoint(text string) (mesh.Endpoint, error) {
	e := mesh.Endpoint{Weight: 1}
	i := strings.LastIndexByte(text, ':')
	if i <= 0 || strings.ContainsAny(text, "/ ") {
		return e, fmt.Errorf("%s is not an address with a port: use ADDRESS:PORT or NAME:PORT, such as 10.0.0.1:8080", capture.Quoted(text))
	}
	port, err := capture.ParsePort(text[i+1:])
	if err != nil {
		return e, err
	}
	host := text[:i]
	if address, ok := parseAddress(host); ok {
		e.Address = netip.AddrPortFrom(address, port)
		return e, nil
	}
	if strings.ContainsAny(host, ":[]") {
		return e, fmt.Errorf("%s is not an address: an IPv6 address is written [::1]:8080", capture.Quoted(text))
	}
	e.Host, e.Port = host, port
	return e, nil
}

// Error is an invalid setting.
type Error struct {
	Setting string
	Err     error
}

func (e *Error) Error() string { return e.Setting + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func invalid(setting, format string, values ...any) error {
	return &Error{setting, fmt.Errorf(format, values...)}
}

// Validate returns the first contradiction between settings, as an Error.
func (c *Config) Validate() error {
	switch {
	case len(c.Listen) == 0:
		return invalid("listen", "is required: a port such as 8443")
	case len(c.Routes) == 0:
		return invalid("route", "is required: HOST=ADDRESS:PORT, such as *=10.0.0.1:8080")
	case len(c.Keys) != len(c.Certificates):
		return invalid("key", "%d keys for %d certificates: give each certificate its key, in the same order", len(c.Keys), len(c.Certificates))
	case len(c.Redirect) > 0 && len(c.Certificates) == 0:
		return invalid("redirect-http", "has no effect without a certificate: add cert and key")
	}
	taken := map[uint16]bool{}
	for _, address := range slices.Concat(c.Listen, c.Redirect) {
		if taken[address.Port()] {
			return invalid("listen", "port %d is there twice: use each port once", address.Port())
		}
		taken[address.Port()] = true
	}
	names := map[string]bool{}
	for i := range c.Routes {
		name := c.Routes[i].name()
		if names[name] {
			return invalid("route", "%s is there twice: separate its addresses by commas", name)
		}
		names[name] = true
	}
	return nil
}

// Parse reads the text of a file: on each line "name: value", or "name:" and then values on lines that begin with "- ". It is
// YAML. An error names the line.
func Parse(text string) (Config, error) {
	var c Config
	var list *Setting // whose values follow
	seen := map[string]bool{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		content := strings.TrimSpace(line)
		if content == "" || content[0] == '#' || content == "---" {
			continue
		}
		setting, value := list, ""
		if item, ok := strings.CutPrefix(content, "- "); ok && list != nil {
			value = strings.TrimSpace(item)
		} else {
			name, rest, found := strings.Cut(content, ":")
			setting = find(name)
			switch {
			case !found || setting == nil:
				return c, fmt.Errorf("line %d: %s is not a setting: use %s", n, capture.Quoted(content), names())
			case seen[name]:
				return c, fmt.Errorf("line %d: %s is there twice: write its values as a list", n, name)
			}
			seen[name], list = true, setting
			if value = strings.TrimSpace(rest); value == "" || value[0] == '#' {
				continue
			}
			list = nil
		}
		plain, ok := proxyconfig.Scalar(value)
		if !ok {
			return c, fmt.Errorf("line %d: %s is not a plain or quoted value: write several values as a list, each on a line after \"- \", and \"*\" in quotes", n, capture.Quoted(value))
		}
		if err := setting.Set(&c, plain); err != nil {
			return c, fmt.Errorf("line %d: %s %s: %w", n, setting.Name, capture.Quoted(plain), err)
		}
	}
	return c, c.Validate()
}

func find(name string) *Setting {
	for i := range Settings {
		if Settings[i].Name == name {
			return &Settings[i]
		}
	}
	return nil
}

// names lists the settings.
func names() string {
	var all []string
	for i := range Settings {
		all = append(all, Settings[i].Name)
	}
	return strings.Join(all, ", ")
}
