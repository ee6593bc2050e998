package capture

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestDefaultIsValidAndCapturesNothing(t *testing.T) {
	spec := Default()
	if err := spec.Validate(); err != nil {
		t.Error(err)
	}
	if !spec.Inbound.None() || !spec.Outbound.None() || len(spec.OutboundPorts) > 0 {
		t.Errorf("it captures: %+v", spec)
	}
}

func TestOwnPortsFollowTheConfiguredOnes(t *testing.T) {
	spec := Default()
	if got, want := spec.OwnPorts(), []uint16{15000, 15001, 15006, 15020, 15021, 15053, 15090}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	spec.OutboundPort, spec.InboundPort = 16001, 80
	if got, want := spec.OwnPorts(), []uint16{80, 15000, 15020, 15021, 15053, 15090, 16001}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestValidateNamesWhatIsWrong(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"no outbound port", func(s *Spec) { s.OutboundPort = 0 }, "outbound port is 0"},
		{"no inbound port", func(s *Spec) { s.InboundPort = 0 }, "inbound port is 0"},
		{"no tunnel port", func(s *Spec) { s.TunnelPort = 0 }, "tunnel port is 0"},
		{"one port for both directions", func(s *Spec) { s.OutboundPort = 15006 }, "outbound port and the inbound port are both 15006"},
		{"a port that the agent needs", func(s *Spec) { s.InboundPort = 15021 }, "readiness port and the inbound port are both 15021"},
		{"nobody is left alone", func(s *Spec) { s.ProxyUIDs, s.ProxyGIDs = nil, nil }, "no proxy user and no proxy group"},
		{"an impossible user", func(s *Spec) { s.ProxyUIDs = []uint32{1<<32 - 1} }, "4294967295 is not a user"},
		{"a range backwards", func(s *Spec) { s.Inbound.List = []PortRange{{90, 80}} }, "90:80"},
		{"a range from 0", func(s *Spec) { s.OutboundPorts = []PortRange{{0, 80}} }, "0:80"},
		{"a network that is not set", func(s *Spec) { s.OutboundExcluded = make([]netip.Prefix, 1) }, "not set"},
		{"an interface with a blank", func(s *Spec) { s.InterfacesExcluded = []string{"eth0 -j"} }, `"eth0 -j" is not an interface`},
	} {
		spec := Default()
		test.change(&spec)
		if err := spec.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got error %v, want %q", test.name, err, test.want)
		}
	}
}

func TestALoneGroupIsEnough(t *testing.T) {
	spec := Default()
	spec.ProxyUIDs = nil
	if err := spec.Validate(); err != nil {
		t.Error(err)
	}
}
