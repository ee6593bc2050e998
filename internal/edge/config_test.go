package edge

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

const example = `# An edge of two services.
listen: 8443
redirect-http: 127.0.0.1:8080   # plain
cert:
- /etc/tls/shop.crt
- "/etc/tls/api.crt"
key:
  - /etc/tls/shop.key
  - '/etc/tls/api.key'
route:
- shop.example=10.0.0.1:8080,10.0.0.2:8080
- shop.example/api=[2001:db8::1]:8080
- "*=web.internal:80"
`

func TestAFileIsRead(t *testing.T) {
	got, err := Parse(example)
	if err != nil {
		t.Fatal(err)
	}
	at := func(address string) mesh.Endpoint {
		return mesh.Endpoint{Address: netip.MustParseAddrPort(address), Weight: 1}
	}
	want := Config{
		Listen:       []netip.AddrPort{netip.AddrPortFrom(netip.Addr{}, 8443)},
		Redirect:     []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:8080")},
		Certificates: []string{"/etc/tls/shop.crt", "/etc/tls/api.crt"},
		Keys:         []string{"/etc/tls/shop.key", "/etc/tls/api.key"},
		Routes: []Route{
			{"shop.example", "/", []mesh.Endpoint{at("10.0.0.1:8080"), at("10.0.0.2:8080")}, "10.0.0.1:8080,10.0.0.2:8080"},
			{"shop.example", "/api", []mesh.Endpoint{at("[2001:db8::1]:8080")}, "[2001:db8::1]:8080"},
			{"*", "/", []mesh.Endpoint{{Host: "web.internal", Port: 80, Weight: 1}}, "web.internal:80"},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// A YAML library reads the same values.
func TestAFileIsYAML(t *testing.T) {
	var values map[string]any
	if err := yaml.Unmarshal([]byte(example), &values); err != nil {
		t.Fatal(err)
	}
	var want Config
	for i := range Settings {
		s := &Settings[i]
		list, ok := values[s.Name].([]any)
		if !ok {
			list = []any{values[s.Name]}
		}
		for _, value := range list {
			if value == nil { // not in the example
				continue
			}
			if err := s.Set(&want, fmt.Sprint(value)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, err := Parse(example); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
}

func TestAnInvalidFileIsRejectedByNameValueAndRemedy(t *testing.T) {
	const valid = "listen: 80\nroute: a=10.0.0.1:80\n"
	for text, want := range map[string]string{
		"":                                      "listen: is required: a port such as 8443",
		"listen: 80":                            "route: is required",
		"route: a=10.0.0.1:80":                  "listen: is required",
		"listen: 80\nroutes: a=10.0.0.1:80":     `line 2: "routes: a=10.0.0.1:80" is not a setting: use listen, cert, key, redirect-http, proxy-protocol, route`,
		"listen":                                `line 1: "listen" is not a setting`,
		"- 80":                                  `line 1: "- 80" is not a setting`,
		valid + "listen: 81":                    "line 3: listen is there twice: write its values as a list",
		"listen: [80, 81]":                      `line 1: "[80, 81]" is not a plain or quoted value: write several values as a list`,
		"listen: 80\nroute: *=10.0.0.1:80":      `line 2: "*=10.0.0.1:80" is not a plain or quoted value`,
		"listen: 80000":                         `line 1: listen "80000": `,
		"listen: host:80":                       `line 1: listen "host:80": "host" is not an address: use PORT, ADDRESS:PORT or [ADDRESS]:PORT`,
		"listen:\n- 80\n- x":                    `line 3: listen "x": `,
		"cert:\n- ''":                           `line 2: cert "": is empty: name a file`,
		"proxy-protocol: on":                    `line 1: proxy-protocol "on": "on" is not a boolean: use true or false`,
		"route: a":                              `line 1: route "a": has no address: use HOST=ADDRESS:PORT`,
		"route: a=10.0.0.1":                     `line 1: route "a=10.0.0.1": "10.0.0.1" is not an address with a port: use ADDRESS:PORT or NAME:PORT`,
		"route: a=":                             `"" is not an address with a port`,
		"route: a=10.0.0.1:80,":                 `"" is not an address with a port`,
		"route: a=::1:80":                       `"::1:80" is not an address: an IPv6 address is written [::1]:8080`,
		"route: a=http://b:80":                  `"http://b:80" is not an address with a port`,
		"route: a=b:0":                          `line 1: route "a=b:0": `,
		"route: a:80=b:80":                      `"a:80" is not a host: use a name without a port`,
		"route: '=b:80'":                        `"" is not a host`,
		"route: a.*.b=b:80":                     `"a.*.b" is not a host`,
		"route: a/x?y=b:80":                     `"/x?y" is not a prefix of a path`,
		valid + "key: a.key":                    "key: 1 keys for 0 certificates: give each certificate its key",
		valid + "redirect-http: 81":             "redirect-http: has no effect without a certificate: add cert and key",
		"listen: 80,80\nroute: a=b:80":          "listen: port 80 is there twice",
		"listen: 80\nroute:\n- a=b:1\n- a/=c:1": "route: a is there twice: separate its addresses by commas",
	} {
		_, err := Parse(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v\nwant %s", text, err, want)
		}
	}
	if _, err := Parse(valid); err != nil {
		t.Error(err)
	}
}
