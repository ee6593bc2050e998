package bench

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// The workload's ports.
const (
	echoPort     = 7000 // answers what it reads
	downloadPort = 7001 // reads a count of 8 bytes, writes so many bytes
	uploadPort   = 7002 // reads to the end, answers the count in 8 bytes
)

const bulkBuffer = 256 << 10

// runWorkload serves the three ports until the process is killed.
func runWorkload([]string) error {
	failed := make(chan error)
	for port, serve := range map[int]func(*net.TCPConn){echoPort: echo, downloadPort: download, uploadPort: upload} {
		listener, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go acceptLoop(listener, serve, failed)
	}
	fmt.Println("warm") // the line that tells the test that the ports are open
	return <-failed
}

func acceptLoop(listener net.Listener, serve func(*net.TCPConn), failed chan<- error) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			failed <- err
			return
		}
		// Only what a proxy carried is answered: a measurement that bypasses the proxy must fail.
		if !conn.RemoteAddr().(*net.TCPAddr).IP.Equal(net.IPv4(127, 0, 0, 6)) {
			conn.Close()
			continue
		}
		go serve(conn.(*net.TCPConn))
	}
}

func echo(conn *net.TCPConn) {
	defer conn.Close()
	buf := make([]byte, 512) // 3,000 idle connections should not make the workload large
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

// writeBytes writes n bytes, or fewer if the connection fails; the reader notices by the count.
func writeBytes(conn *net.TCPConn, n int64) {
	buf := make([]byte, bulkBuffer)
	for n > 0 {
		wrote, err := conn.Write(buf[:min(n, bulkBuffer)])
		if err != nil {
			return
		}
		n -= int64(wrote)
	}
}

// readBytes reads to the end and returns how much there was.
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
