package run

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/datagram"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/sandbox"
)

// Reasons of records of datagrams. They are not those of connections.
const (
	udpRejected = "udp_rejected" // datagrams are not carried
	udpFailed   = "udp_failed"   // the last error was reported to the command
)

// carryDatagrams carries the command's datagrams. The policy judges them by address, because they claim no name.
func (t *traffic) carryDatagrams(box *sandbox.Sandbox, records *records) {
	config := datagram.Config{Links: box.Packets, Addresses: []netip.Addr{sandbox.Address4, sandbox.Address6}, Ended: records.exchanged}
	if records.view != nil {
		config.Began = t.listDatagrams
		config.Ended = func(f datagram.Flow) {
			if f.Live != nil {
				t.table.Leave(f.Live)
			}
			records.exchanged(f)
		}
	}
	if t.policy != nil {
		config.Judge = func(to netip.AddrPort) string { return t.policy.Connection(to, "") }
	}
	t.datagrams = datagram.New(config)
}

// listDatagrams lists a flow among the open connections of the live page.
func (t *traffic) listDatagrams(f *datagram.Flow) {
	f.Live = flow.Open(flow.Outbound, f.Client)
	f.Live.OriginalDestination, f.Live.Upstream = f.Destination, f.Destination
	t.table.List(f.Live)
	t.table.Carry(f.Live, flow.UDP, flow.Hello{})
}

// exchanged records a flow of datagrams. Flows that were not carried are recorded once for each destination.
func (r *records) exchanged(f datagram.Flow) {
	record := live.Record{
		Downstream: f.Client.String(), Destination: f.Destination.String(),
		DurationMS: float64(f.Used.Sub(f.Opened).Microseconds()) / 1000, Received: f.Sent, Sent: f.Received, Reason: string(flow.Completed),
	}
	switch {
	case f.Denied != "":
		record.Reason, record.Failed, record.Failure = string(flow.Denied), true, f.Denied
	case f.Failure != "":
		record.Reason, record.Failed, record.Failure = udpFailed, true, f.Failure
	}
	if f.Sent == 0 && !r.first("udp "+record.Destination+" "+record.Reason) {
		return
	}
	r.note(flow.UDP, record)
}

// dropped records a datagram that was rejected, once for each destination.
func (r *records) dropped(destination string) {
	if !r.first("udp " + destination) {
		return
	}
	failure := "UDP is not carried: --udp allow carries it"
	if r.config.Datagrams {
		failure = "datagrams to groups of hosts are not carried"
	}
	r.note(flow.UDP, live.Record{Destination: destination, Reason: udpRejected, Failed: true, Failure: failure})
}
