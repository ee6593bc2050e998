package bench

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// The workload's ports.
const (
	echoPort     = 7000 // echoes
	downloadPort = 7001 // reads a count in 8 bytes and writes that many bytes
	uploadPort   = 7002 // reads to the end and writes the count in 8 bytes
	http1Port    = 7003 // see http1Origin
	http2Port    = 7004 // see http2Origin
)

// Each of them serves as one of several endpoints.
var (
	http1Ports = []int{http1Port, 7005, 7006}
	http2Ports = []int{http2Port, 7007, 7008}
	tlsPorts   = []int{7010, 7011, 7012} // of http1Ports' requests without a body, inside TLS
)

const bulkBuffer = 256 << 10

// proxyAddress is the source address of connections that a proxy carried.
var proxyAddress = netip.AddrFrom4([4]byte{127, 0, 0, 6})

// runWorkload serves the ports until the process is killed.
func runWorkload(args []string) error {
	flags := flag.NewFlagSet("workload", flag.ContinueOnError)
	direct := flags.Bool("direct", false, "expect connections from other addresses than an inbound proxy's")
	certificates := flags.String("certificates", "", "directory with the certificates of a mesh, for the ports with TLS; empty: they are closed")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// Connections from other addresses are closed: a measurement that bypasses the proxy must fail.
	expected := func(from netip.Addr) bool { return (from == proxyAddress) != *direct }
	failed := make(chan error)
	for port, serve := range map[int]func(*net.TCPConn){echoPort: echo, downloadPort: download, uploadPort: upload} {
		listener, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go acceptLoop(listener, expected, serve, failed)
	}
	origins, err := newLoop()
	if err != nil {
		return err
	}
	for i := range http1Ports {
		if err := errors.Join(origins.listen(http1Ports[i], expected, newHTTP1Origin), origins.listen(http2Ports[i], expected, newHTTP2Origin)); err != nil {
			return err
		}
	}
	if *certificates != "" {
		if err := serveSecured(*certificates, failed); err != nil {
			return err
		}
	}
	go func() { failed <- origins.run(0, func() bool { return false }) }()
	fmt.Println("warm") // the ports are open
	return <-failed
}

func acceptLoop(listener net.Listener, expected func(netip.Addr) bool, serve func(*net.TCPConn), failed chan<- error) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			failed <- err
			return
		}
		if !expected(conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()) {
			conn.Close()
			continue
		}
		go serve(conn.(*net.TCPConn))
	}
}

func echo(conn *net.TCPConn) {
	defer conn.Close()
	buf := make([]byte, 512) // small, for 3,000 idle connections
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if _, err := conn.Write(buf[:n]); err != nil {
			return
		}
	}
}

func download(conn *net.TCPConn) {
	defer conn.Close()
	var count [8]byte
	if _, err := io.ReadFull(conn, count[:]); err != nil {
		return
	}
	writeBytes(conn, int64(binary.BigEndian.Uint64(count[:])))
}

func upload(conn *net.TCPConn) {
	defer conn.Close()
	var count [8]byte
	binary.BigEndian.PutUint64(count[:], uint64(readBytes(conn)))
	conn.Write(count[:])
}

// writeBytes writes n bytes, or fewer if the connection fails; the reader detects that by the count.
func writeBytes(conn net.Conn, n int64) {
	buf := make([]byte, bulkBuffer)
	for n > 0 {
		wrote, err := conn.Write(buf[:min(n, bulkBuffer)])
		if err != nil {
			return
		}
		n -= int64(wrote)
	}
}

// readBytes reads to the end and returns the number of bytes.
func readBytes(conn *net.TCPConn) (total int64) {
	buf := make([]byte, bulkBuffer)
	for {
		n, err := conn.Read(buf)
		total += int64(n)
		if err != nil {
			return total
		}
	}
}
