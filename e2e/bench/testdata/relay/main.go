// Command relay is a minimal transparent relay in Go: accept, get the original destination, dial, io.Copy both ways.
// Pillion's relay must outperform it. IPv4 only; see package bench.
package main

import (
	"encoding/binary"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"syscall"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: relay <listen address> <readiness address>")
	}
	listener, err := net.Listen("tcp4", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	go serveReadiness(os.Args[2])
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn.(*net.TCPConn))
	}
}

func serveReadiness(address string) {
	ready := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	log.Fatal(http.ListenAndServe(address, ready))
}

func serve(down *net.TCPConn) {
	defer down.Close()
	to, err := originalDestination(down)
	if err != nil {
		log.Print(err)
		return
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 6)}}
	conn, err := dialer.Dial("tcp4", to.String())
	if err != nil {
		log.Print(err)
		return
	}
	up := conn.(*net.TCPConn)
	defer up.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyAndFinish(up, down)
	}()
	copyAndFinish(down, up)
	<-done
}

func copyAndFinish(to, from *net.TCPConn) {
	io.Copy(to, from)
	to.CloseWrite()
}

// originalDestination asks for SO_ORIGINAL_DST by way of the only getsockopt in package syscall that returns as many
// bytes as a sockaddr_in has.
func originalDestination(conn *net.TCPConn) (*net.TCPAddr, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	const soOriginalDst = 80
	var sockaddr *syscall.IPv6Mreq
	var failed error
	err = raw.Control(func(fd uintptr) {
		sockaddr, failed = syscall.GetsockoptIPv6Mreq(int(fd), syscall.IPPROTO_IP, soOriginalDst)
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, os.NewSyscallError("getsockopt SO_ORIGINAL_DST", err)
	}
	bytes := sockaddr.Multiaddr
	return &net.TCPAddr{IP: bytes[4:8], Port: int(binary.BigEndian.Uint16(bytes[2:4]))}, nil
}
