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
		{"no outbound port", func(s *Spec) { s.OutboundPort = 0 }, "-p 0: the outbound port is one from 1"},
		{"no inbound port", func(s *Spec) { s.InboundPort = 0 }, "-z 0: the inbound port is one from 1"},
		{"no tunnel port", func(s *Spec) { s.TunnelPort = 0 }, "-e 0: the tunnel port is one from 1"},
		{"one port for both directions", func(s *Spec) { s.OutboundPort = 15006 }, "-z 15006: the outbound port and the inbound port are the same"},
		{"a port that the agent needs", func(s *Spec) { s.InboundPort = 15021 }, "-z 15021: the readiness port and the inbound port are the same"},
		{"nobody is left alone", func(s *Spec) { s.ProxyUIDs, s.ProxyGIDs = nil, nil }, "-u and -g name no user and no group"},
		{"an impossible user", func(s *Spec) { s.ProxyUIDs = []IDRange{{1, 1<<32 - 1}} }, "-u 1-4294967295: a user or group"},
		{"a range backwards", func(s *Spec) { s.Inbound.List = []PortRange{{90, 80}} }, "-b 90:80: a range"},
		{"a range from 0", func(s *Spec) { s.OutboundPorts = []PortRange{{0, 80}} }, "-q 0:80: a range"},
		{"a network that is not set", func(s *Spec) { s.OutboundExcluded = make([]netip.Prefix, 1) }, "-x: a network is not set"},
		{"an interface with a blank", func(s *Spec) { s.InterfacesExcluded = []string{"eth0 -j"} }, `-c: "eth0 -j" is not an interface`},
		{"a virtual interface without a name", func(s *Spec) { s.VirtualInterfaces = []string{"+"} }, `-k: "+" is not an interface`},
		{"a group backwards", func(s *Spec) { s.OwnerGroupsExcluded = []IDRange{{9, 8}} }, "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE 9-8"},
		{"too many groups", func(s *Spec) { s.OwnerGroups = Groups{List: make([]IDRange, 65)} }, "ISTIO_OUTBOUND_OWNER_GROUPS lists 65 groups: at most 64"},
		{"a loopback network that is none", func(s *Spec) { s.Localhost4 = netip.MustParsePrefix("10.0.0.0/8") }, `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "10.0.0.0/8" is not`},
		{"a server that is not set", func(s *Spec) { s.DNSServers = make([]netip.Addr, 1) }, "a DNS server is not set"},
		{"no mode", func(s *Spec) { s.Mode = "" }, `-m "" is not a mode: use REDIRECT or TPROXY`},
		{"mark 0", func(s *Spec) { s.Mode, s.TPROXYMark = TPROXY, 0 }, "-t 0: use a mark that is neither 0 nor 1338"},
		{"the mark that the rules need", func(s *Spec) { s.Mode, s.TPROXYMark = TPROXY, 1338 }, "-t 1338: use a mark"},
		{"the main table", func(s *Spec) { s.Mode, s.TPROXYTable = TPROXY, 254 }, "-r 254: use a routing table of its own"},
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

func TestExactly64GroupsArePossibleAndAnyNumberOfOthers(t *testing.T) {
	spec := Default()
	spec.OwnerGroupsExcluded = make([]IDRange, 10*MaxOwnerGroups)
	spec.OwnerGroups = Groups{List: make([]IDRange, MaxOwnerGroups)}
	if err := spec.Validate(); err != nil {
		t.Error(err)
	}
}

func TestDNSIsCapturedWhereThereIsAServerAndPort53IsNotExcluded(t *testing.T) {
	server := []netip.Addr{netip.MustParseAddr("10.0.0.53")}
	for want, specs := range map[bool][]Spec{
		true: {{RedirectDNS: true, DNSServers: server}, {RedirectDNS: true, CaptureAllDNS: true}},
		false: {{DNSServers: server, CaptureAllDNS: true}, {RedirectDNS: true},
			{RedirectDNS: true, CaptureAllDNS: true, OutboundPortsExcluded: []PortRange{{50, 60}}}},
	} {
		for _, spec := range specs {
			if spec.CapturesDNS() != want {
				t.Errorf("%+v captures DNS: %t", spec, !want)
			}
		}
	}
}
