package sockopt

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Listens reports whether a socket of this network namespace listens at an address. It asks the kernel (sock_diag(7)), so
// no connection is made. A kernel without the module tcp_diag answers as if there were no such socket. If the kernel
// cannot be asked at all, Listens returns true.
func Listens(at netip.AddrPort) bool {
	request := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	request.AddData(listener(at))
	_, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	return !errors.Is(err, unix.ENOENT)
}

// listener is a struct inet_diag_req_v2 that asks for one socket. Without a remote end, only a listening socket matches.
type listener netip.AddrPort

const listenerSize = 56

// Len implements nl.NetlinkRequestData.
func (l listener) Len() int { return listenerSize }

// Serialize implements nl.NetlinkRequestData.
func (l listener) Serialize() []byte {
	at := netip.AddrPort(l)
	b := make([]byte, listenerSize)
	b[0], b[1] = unix.AF_INET, unix.IPPROTO_TCP
	if at.Addr().Is6() {
		b[0] = unix.AF_INET6
	}
	binary.NativeEndian.PutUint32(b[4:], 1<<10) // idiag_states: TCP_LISTEN
	binary.BigEndian.PutUint16(b[8:], at.Port())
	copy(b[12:28], at.Addr().AsSlice())
	for i := 48; i < 56; i++ { // idiag_cookie: INET_DIAG_NOCOOKIE
		b[i] = 0xff
	}
	return b
}
