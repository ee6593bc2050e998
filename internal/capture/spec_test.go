package capture

import (
	"errors"
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

func TestValidateNamesTheField(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"no outbound port", func(s *Spec) { s.OutboundPort = 0 }, "OutboundPort 0: use a port from 1 to 65535"},
		{"no inbound port", func(s *Spec) { s.InboundPort = 0 }, "InboundPort 0: use a port"},
		{"no tunnel port", func(s *Spec) { s.TunnelPort = 0 }, "TunnelPort 0: use a port"},
		{"one port for both directions", func(s *Spec) { s.OutboundPort = 15006 }, "InboundPort 15006: this is the outbound port already"},
		{"a port that the agent needs", func(s *Spec) { s.InboundPort = 15021 }, "InboundPort 15021: this is the readiness port already"},
		{"no user and no group of the agent", func(s *Spec) { s.ProxyUIDs, s.ProxyGIDs = nil, nil }, "ProxyUIDs: name a user or a group, or the agent's own connections would be captured; a group is named by ProxyGIDs"},
		{"an impossible user", func(s *Spec) { s.ProxyUIDs = []IDRange{{1, 1<<32 - 1}} }, "ProxyUIDs 1-4294967295: a user or group is a number from 0 to 4294967294"},
		{"an impossible group", func(s *Spec) { s.ProxyGIDs = []IDRange{{2, 1}} }, "ProxyGIDs 2-1: a user or group"},
		{"a descending range", func(s *Spec) { s.Inbound.List = []PortRange{{90, 80}} }, "Inbound 90:80: a port range must begin at 1"},
		{"a range from 0", func(s *Spec) { s.OutboundPorts = []PortRange{{0, 80}} }, "OutboundPorts 0:80: a port range"},
		{"an exception from 0", func(s *Spec) { s.InboundExcluded = []PortRange{{0, 80}} }, "InboundExcluded 0:80: a port range"},
		{"an outbound exception from 0", func(s *Spec) { s.OutboundPortsExcluded = []PortRange{{0, 80}} }, "OutboundPortsExcluded 0:80: a port range"},
		{"a network that is not set", func(s *Spec) { s.Outbound.List = make([]netip.Prefix, 1) }, "Outbound: a network is not set"},
		{"an excluded network that is not set", func(s *Spec) { s.OutboundExcluded = make([]netip.Prefix, 1) }, "OutboundExcluded: a network is not set"},
		{"an interface with a blank", func(s *Spec) { s.InterfacesExcluded = []string{"eth0 -j"} }, `InterfacesExcluded: "eth0 -j" is not an interface`},
		{"a virtual interface without a name", func(s *Spec) { s.VirtualInterfaces = []string{"+"} }, `VirtualInterfaces: "+" is not an interface`},
		{"a descending range of groups", func(s *Spec) { s.OwnerGroupsExcluded = []IDRange{{9, 8}} }, "OwnerGroupsExcluded 9-8: a user or group"},
		{"too many groups", func(s *Spec) { s.OwnerGroups = Groups{List: make([]IDRange, 65)} }, "OwnerGroups: lists 65 groups; at most 64"},
		{"not a loopback network", func(s *Spec) { s.Localhost4 = netip.MustParsePrefix("10.0.0.0/8") }, `Localhost4: "10.0.0.0/8" is not`},
		{"a server that is not set", func(s *Spec) { s.DNSServers = make([]netip.Addr, 1) }, "DNSServers: a DNS server is not set"},
		{"no mode", func(s *Spec) { s.Mode = "" }, `Mode: "" is not a mode; use REDIRECT or TPROXY`},
		{"mark 0", func(s *Spec) { s.Mode, s.TPROXYMark = TPROXY, 0 }, "TPROXYMark 0: use a mark other than 0 and 1338; the rules use 1338 themselves"},
		{"the mark that the rules need", func(s *Spec) { s.Mode, s.TPROXYMark = TPROXY, 1338 }, "TPROXYMark 1338: use a mark"},
		{"table 0", func(s *Spec) { s.Mode, s.TPROXYTable = TPROXY, 0 }, "TPROXYTable 0: use a separate routing table"},
		{"the first table of the kernel", func(s *Spec) { s.Mode, s.TPROXYTable = TPROXY, 253 }, "TPROXYTable 253: use a separate routing table"},
		{"the last table of the kernel", func(s *Spec) { s.Mode, s.TPROXYTable = TPROXY, 255 }, "TPROXYTable 255: use a separate routing table"},
	} {
		spec := Default()
		test.change(&spec)
		err := spec.Validate()
		if err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("%s: got error %v, want %q", test.name, err, test.want)
		}
		if !errors.As(err, new(*FieldError)) {
			t.Errorf("%s: %T is not a FieldError", test.name, err)
		}
	}
}

func TestTablesBesideTheKernelsAreValid(t *testing.T) {
	for _, table := range []uint32{1, 252, 256} {
		spec := Default()
		spec.Mode, spec.TPROXYTable = TPROXY, table
		if err := spec.Validate(); err != nil {
			t.Errorf("table %d: %v", table, err)
		}
	}
}

func TestAGroupWithoutUsersIsValid(t *testing.T) {
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

func TestASingleValueIsAValidRange(t *testing.T) {
	spec := Default()
	spec.Inbound.List, spec.OutboundPorts = []PortRange{{80, 80}}, []PortRange{{1, 65535}}
	spec.OwnerGroupsExcluded = []IDRange{{5, 5}, {0, 1<<32 - 2}}
	if err := spec.Validate(); err != nil {
		t.Error(err)
	}
}

// Marks and routes are needed only if TPROXY captures something.
func TestTPROXYNeedsInboundPorts(t *testing.T) {
	for _, test := range []struct {
		mode    Mode
		inbound Ports
		want    bool
	}{{TPROXY, Ports{All: true}, true}, {TPROXY, Ports{List: []PortRange{{80, 80}}}, true}, {TPROXY, Ports{}, false}, {Redirect, Ports{All: true}, false}} {
		if got := (Spec{Mode: test.mode, Inbound: test.inbound}).CapturesInboundByTPROXY(); got != test.want {
			t.Errorf("%s, %+v: got %t", test.mode, test.inbound, got)
		}
	}
}

func TestNoneIsNeitherAllNorAList(t *testing.T) {
	for _, test := range []struct {
		none, want bool
	}{
		{Ports{}.None(), true}, {Ports{All: true}.None(), false}, {Ports{List: []PortRange{{80, 80}}}.None(), false},
		{Prefixes{}.None(), true}, {Prefixes{All: true}.None(), false}, {Prefixes{List: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}.None(), false},
	} {
		if test.none != test.want {
			t.Errorf("got %t, want %t", test.none, test.want)
		}
	}
}
