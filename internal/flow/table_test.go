package flow

import (
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/envoy"
)

var downstream = netip.MustParseAddrPort("198.51.100.2:4711")

// recorder is a sink that keeps what it receives.
type recorder struct {
	table          *Table
	opened, closed []*Record
	listed         []int // how many connections were listed when a record was closed
}

func (s *recorder) Opened(r *Record) { s.opened = append(s.opened, r) }
func (s *recorder) Closed(r *Record) {
	s.closed = append(s.closed, r)
	s.listed = append(s.listed, s.table.Open())
}

func list(t *Table) (records []*Record) {
	t.Each(func(r *Record) bool { records = append(records, r); return true })
	return records
}

func TestATableListsOpenConnectionsAndReportsClosedOnes(t *testing.T) {
	var sink recorder
	var plain lastRecord
	table := NewTable(&plain, &sink)
	sink.table = table
	a, b, c := Open(Inbound, downstream), Open(Outbound, downstream), Open(Outbound, downstream)
	for _, r := range []*Record{a, b, c} {
		table.List(r)
	}
	if got := list(table); !slices.Equal(got, []*Record{c, b, a}) || table.Open() != 3 {
		t.Errorf("listed: %v", got)
	}
	if len(sink.opened) != 0 || a.Carried() {
		t.Error("a connection counts as carried before its protocol is known")
	}
	table.Carry(b, TLS, Hello{ServerName: "a.example"})
	if !slices.Equal(sink.opened, []*Record{b}) || b.Protocol != TLS || b.TLS().ServerName != "a.example" || !b.Carried() {
		t.Errorf("opened %v, %+v", sink.opened, b)
	}
	b.Close(table, Closed, nil) // from the middle
	table.Leave(c)              // from the front, not reported
	table.Leave(c)
	if got := list(table); !slices.Equal(got, []*Record{a}) {
		t.Errorf("listed: %v", got)
	}
	never := Open(Inbound, downstream) // refused before it was listed
	never.Close(table, NoOriginalDestination, nil)
	a.Close(table, UpstreamRefused, nil)
	if table.Open() != 0 || len(list(table)) != 0 {
		t.Errorf("still listed: %v", list(table))
	}
	want := []*Record{b, never, a}
	if !slices.Equal(sink.closed, want) || !slices.Equal(plain.closed, want) || !slices.Equal(sink.listed, []int{2, 1, 0}) {
		t.Errorf("received %v while %v were listed; want %v", sink.closed, sink.listed, want)
	}
}

func TestEachStopsWhenFReturnsFalse(t *testing.T) {
	table := NewTable()
	for range 3 {
		table.List(Open(Inbound, downstream))
	}
	n := 0
	table.Each(func(*Record) bool { n++; return n < 2 })
	if n != 2 {
		t.Errorf("%d calls", n)
	}
}

// Under the race detector: owners open, carry and close connections while other goroutines read the table.
func TestATableIsSafeForConcurrentUse(t *testing.T) {
	table := NewTable()
	var owners, watchers sync.WaitGroup
	done := make(chan struct{})
	watchers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			table.Each(func(r *Record) bool {
				if r.Carried() && r.Protocol != TLS {
					t.Error("carried before its protocol was set")
				}
				if r.Carried() && (r.Flags() != "" || r.Reason != "" || r.Duration != 0 || r.Err != nil) {
					t.Error("the record of an open connection has fields that Close sets")
				}
				return r.Downstream.IsValid() && r.Received.Load() < 1<<40
			})
		}
	})
	for range 4 {
		owners.Go(func() {
			for i := range 500 {
				r := Open(Inbound, downstream)
				table.List(r)
				r.UpstreamLocal = downstream
				table.Carry(r, TLS, Hello{ServerName: "a.example"})
				r.Received.Add(7)
				runtime.Gosched() // so that readers see it
				if i%2 == 0 {
					table.Leave(r)
				} else {
					r.Close(table, UpstreamReset, net.ErrClosed)
				}
			}
		})
	}
	owners.Wait()
	close(done)
	watchers.Wait()
	if table.Open() != 0 {
		t.Errorf("%d connections are still listed", table.Open())
	}
}

// Istio's flags and details depend on whether a connection or a request ended, and on those that the engine has set.
func TestFlagsAndDetails(t *testing.T) {
	for _, c := range []struct {
		reason                 Reason
		request                bool
		flags, details         string // of the engine
		wantFlags, wantDetails string
	}{
		{reason: UpstreamRefused, wantFlags: "UF,URX"},
		{reason: UpstreamRefused, request: true, wantFlags: "UF", wantDetails: "upstream_reset_before_response_started{remote_connection_failure}"},
		{reason: UpstreamRefused, request: true, flags: "UF", details: "x", wantFlags: "UF", wantDetails: "x"},
		{reason: Completed, request: true, details: "via_upstream", wantDetails: "via_upstream"},
		{reason: DrainDeadline, request: true, details: "via_upstream", wantFlags: "LR", wantDetails: "via_upstream"},
		{reason: Loop, wantFlags: "UH"},
		{reason: PolicyDenied, flags: "UAEX", details: "ext_authz_error", wantFlags: "UAEX", wantDetails: "ext_authz_error"},
		{reason: PolicyDenied, details: envoy.DeniedByPolicy("p")}, // its TerminationDetails
		{reason: PolicyDenied, request: true, details: envoy.DeniedByPolicy("p"), wantDetails: envoy.DeniedByPolicy("p")},
		{reason: Closed},
	} {
		r := Open(Outbound, downstream)
		if c.request {
			r.Connection = Open(Outbound, downstream)
		}
		if r.Flags() != "" || r.Details() != "" {
			t.Errorf("%s: %q, %q before the end", c.reason, r.Flags(), r.Details())
		}
		r.HTTP = &Request{Flags: c.flags, Details: c.details}
		r.Close(NewTable(), c.reason, nil)
		if r.Flags() != c.wantFlags || r.Details() != c.wantDetails {
			t.Errorf("%+v: %q, %q", c, r.Flags(), r.Details())
		}
		if got := r.TerminationDetails(); (got != "") != (!c.request && envoy.IsDenial(c.details)) || got != "" && got != c.details {
			t.Errorf("%+v: its termination details are %q", c, got)
		}
		if c.request && r.Connection.Requests.Load() != 1 {
			t.Errorf("%s: the connection counts %d requests", c.reason, r.Connection.Requests.Load())
		}
	}
}

// Reading a table of ten thousand connections does not delay their requests.
func TestARequestEndsWhileTheTableIsRead(t *testing.T) {
	var sink lastRecord
	table := NewTable(&sink)
	connection := Open(Inbound, downstream)
	table.List(connection)
	table.Each(func(*Record) bool {
		request := Open(Inbound, downstream)
		request.Connection = connection
		request.Close(table, Completed, nil) // would deadlock
		return true
	})
	table.Leave(connection)
}

func TestSinksDoNotShareAPlace(t *testing.T) {
	a, b := NewPlace(), NewPlace()
	r := Open(Inbound, downstream)
	a.Set(r, "a")
	b.Set(r, "b")
	if a.Get(r) != "a" || b.Get(r) != "b" {
		t.Errorf("got %v and %v", a.Get(r), b.Get(r))
	}
	next := Open(Inbound, downstream)
	next.Continue(r)
	if a.Get(next) != "a" || b.Get(next) != "b" {
		t.Errorf("the record that continues has %v and %v", a.Get(next), b.Get(next))
	}
	defer func() {
		if recover() == nil {
			t.Errorf("more than %d places could be taken", maxPlaces)
		}
	}()
	for range maxPlaces {
		NewPlace()
	}
}
