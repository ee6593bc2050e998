package kernel

import (
	"reflect"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/rulestest"
)

func TestRoutesAreNeededByTPROXYOfInboundPortsAlone(t *testing.T) {
	route4, rule4 := Route{ruleset.IPv4, 0, 133}, Route{ruleset.IPv4, 1337, 133}
	route6, rule6 := Route{ruleset.IPv6, 0, 133}, Route{ruleset.IPv6, 1337, 133}
	outboundOnly := rulestest.TPROXYAll
	outboundOnly.Inbound = capture.Ports{}
	for _, test := range []struct {
		spec     capture.Spec
		families []ruleset.Family
		want     []Route
	}{
		{rulestest.TPROXYAll, ruleset.Families, []Route{route4, rule4, route6, rule6}},
		{rulestest.TPROXYAll, ruleset.Families[:1], []Route{route4, rule4}},
		{outboundOnly, ruleset.Families, nil},
		{rulestest.CaptureAll, ruleset.Families, nil},
	} {
		if got := RoutesFor(test.spec, test.families); !reflect.DeepEqual(got, test.want) {
			t.Errorf("got %v, want %v", got, test.want)
		}
	}
}

func TestOnlyDifferentRoutesAreChanged(t *testing.T) {
	rule, other := Route{ruleset.IPv4, 1337, 133}, Route{ruleset.IPv4, 7, 200}
	ours, theirs := Installed{rule, true, 5}, Installed{rule, false, 6}
	for _, test := range []struct {
		name string
		want []Route
		have []Installed
		says string
	}{
		{"nothing is there", []Route{rule}, nil, "add fwmark 0x539 lookup 133"},
		{"ours is there", []Route{rule}, []Installed{ours}, ""},
		{"a foreign one does as well", []Route{rule}, []Installed{theirs}, ""},
		{"ours is there twice", []Route{rule}, []Installed{ours, ours}, "remove fwmark 0x539 lookup 133"},
		{"ours is not wanted any more", []Route{other}, []Installed{ours}, "add fwmark 0x7 lookup 200; remove fwmark 0x539 lookup 133"},
		{"a foreign one is not wanted", nil, []Installed{theirs}, ""},
	} {
		var says []string
		for _, c := range DiffRoutes(test.want, test.have) {
			says = append(says, string(c.Action)+" "+c.Route.String())
		}
		if got := strings.Join(says, "; "); got != test.says {
			t.Errorf("%s: %q, want %q", test.name, got, test.says)
		}
	}
}
