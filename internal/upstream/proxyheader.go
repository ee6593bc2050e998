package upstream

import (
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// WriteProxyHeader sends a PROXY protocol header, version 2, with the client's address and the original destination, as the
// first bytes of a fresh connection.
func WriteProxyHeader(up *tcp.Conn, downstream, destination netip.AddrPort) error {
	header, err := proxyproto.HeaderProxyFromAddrs(2, net.TCPAddrFromAddrPort(downstream), net.TCPAddrFromAddrPort(destination)).Format()
	if err != nil {
		return fmt.Errorf("writing a PROXY protocol header: %w", err)
	}
	// At most 52 bytes: they always fit into the empty send buffer of a fresh connection.
	if n, err := up.Write(header); err != nil {
		return fmt.Errorf("writing a PROXY protocol header: %w", err)
	} else if n < len(header) {
		return fmt.Errorf("writing a PROXY protocol header: %w", io.ErrShortWrite)
	}
	return nil
}
