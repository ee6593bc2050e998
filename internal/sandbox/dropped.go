package sandbox

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// headerBytes is how much of a rejected packet is reported: the longest headers up to the ports.
const headerBytes = 60 + 4

// Message types and attributes of linux/netfilter/nfnetlink_log.h.
const (
	nfulnlPacket, nfulnlConfig = 0, 1

	nfulaPayload = 9

	nfulaConfigCommand, nfulaConfigMode = 1, 2

	nfulnlCommandBind = 1
	nfulnlCopyPacket  = 2
)

// dropped is the kernel's log of rejected datagrams.
type dropped struct {
	socket *nl.NetlinkSocket
	last   *nl.NetlinkRequest // asks for an acknowledgement, which the kernel appends to the log
	read   chan struct{}      // closed with that acknowledgement
}

// watchDropped reports the destination of each rejected datagram to the caller. Without the kernel's module they are
// rejected silently.
func (h *inside) watchDropped() error {
	socket, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return failed("watching rejected packets", err)
	}
	mode := nl.NewRtAttr(nfulaConfigMode, []byte{0, 0, 0, headerBytes, nfulnlCopyPacket, 0})
	for _, attribute := range []*nl.RtAttr{nl.NewRtAttr(nfulaConfigCommand, []byte{nfulnlCommandBind}), mode} {
		if err := socket.Send(configRequest(attribute, 0)); err != nil {
			socket.Close()
			return failed("watching rejected packets", err)
		}
	}
	h.dropped = dropped{socket, configRequest(mode, unix.NLM_F_ACK), make(chan struct{})}
	go h.reportDropped()
	return nil
}

func configRequest(attribute *nl.RtAttr, flags int) *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_ULOG<<8|nfulnlConfig, flags)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0, ResId: binary.NativeEndian.Uint16([]byte{0, dropGroup})})
	request.AddData(attribute)
	return request
}

// awaitDropped returns when the datagrams that have been rejected are reported, and after a second at the latest.
func (h *inside) awaitDropped() {
	if h.dropped.socket.Send(h.dropped.last) != nil {
		return
	}
	select {
	case <-h.dropped.read:
	case <-time.After(time.Second):
	}
}

func (h *inside) reportDropped() {
	for {
		messages, _, err := h.dropped.socket.Receive()
		if err == unix.ENOBUFS || err == unix.EINTR {
			continue // some were lost
		}
		if err != nil {
			return
		}
		for _, m := range messages {
			if m.Header.Type == unix.NLMSG_ERROR && m.Header.Seq == h.dropped.last.Seq {
				close(h.dropped.read)
				return
			}
			if m.Header.Type != unix.NFNL_SUBSYS_ULOG<<8|nfulnlPacket || len(m.Data) < nl.SizeofNfgenmsg {
				continue
			}
			if destination := destinationOf(m.Data[nl.SizeofNfgenmsg:]); destination != "" {
				h.write(message{Kind: "dropped", Text: destination})
			}
		}
	}
}

// destinationOf returns the destination of the packet in a message, or "".
func destinationOf(attributes []byte) string {
	list, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return ""
	}
	for _, a := range list {
		if a.Attr.Type&nl.NLA_TYPE_MASK == nfulaPayload {
			return packetDestination(a.Value)
		}
	}
	return ""
}

func packetDestination(packet []byte) string {
	if len(packet) < 20 {
		return ""
	}
	var address netip.Addr
	transport := int(packet[0]&0xf) * 4
	if packet[0]>>4 == 4 {
		address = netip.AddrFrom4([4]byte(packet[16:20]))
	} else {
		transport = 40
		if len(packet) < transport {
			return ""
		}
		address = netip.AddrFrom16([16]byte(packet[24:40]))
	}
	if len(packet) < transport+4 {
		return ""
	}
	return netip.AddrPortFrom(address, binary.BigEndian.Uint16(packet[transport+2:])).String()
}
