package bench

import (
	"bufio"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// A load warms up, prints "warm", waits for a line, runs, prints "done" and its report, if any, and keeps its connections
// open until its input ends.
type load struct {
	warm, run func() error
	report    func() string // may be nil
}

// loadSources are the addresses that the load connects from in turn, so that no address runs out of ports.
var loadSources = []string{"198.51.100.11", "198.51.100.12", "198.51.100.13", "198.51.100.14"}

const messageSize = 64

func runLoad(args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	kind := flags.String("kind", "", "what to do")
	count := flags.Int64("count", 0, "bytes, connections, messages or requests")
	workers := flags.Int("workers", 1, "how many at a time")
	certificates := flags.String("certificates", "", "directory with the certificates of a mesh")
	to := flags.String("to", "", "address and port to connect to; empty: the pod's, of the kind of load")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *to != "" {
		var err error
		if destination, err = netip.ParseAddrPort(*to); err != nil {
			return err
		}
	}
	var l load
	switch *kind {
	case "edge-http1", "edge-http2", "edge-connections":
		var err error
		if l, err = edgeLoad(*certificates, *kind, *workers, *count); err != nil {
			return err
		}
	case "tls-http1", "tls-connections", "tls-download", "tls-upload", "tls-idle":
		var err error
		if l, err = securedLoad(*certificates, *kind, *workers, *count); err != nil {
			return err
		}
	case "download", "upload", "http-download", "http-upload":
		move := map[string]func(int64) error{
			"download": downloadOnce, "upload": uploadOnce, "http-download": httpDownloadOnce, "http-upload": httpUploadOnce,
		}[*kind]
		l.warm = func() error { return move(min(*count, 64<<20)) }
		l.run = func() error {
			return inParallel(*workers, int64(*workers), func(int64) error { return move(*count / int64(*workers)) })
		}
	case "connections", "http-connections":
		use := map[string]func(int64) error{"connections": exchangeOnce, "http-connections": requestOnce}[*kind]
		l.warm = func() error { return inParallel(*workers, min(*count, 500), use) }
		l.run = func() error { return inParallel(*workers, *count, use) }
	case "messages":
		l = messagesLoad(*workers, *count)
	case "http1":
		l = http1Load(*workers, *count)
	case "http2":
		l = http2Load(*workers, streamsEach, *count)
	case "latency":
		l = latencyLoad(*workers, *count)
	case "idle":
		l.warm = func() error { return inParallel(*workers, 32, exchangeOnce) }
		l.run = func() error { return openIdle(*workers, *count, echoPort, exchangeThrice) }
	case "http-idle":
		l.warm = func() error { return inParallel(*workers, 32, requestOnce) }
		l.run = func() error { return openIdle(*workers, *count, http1Port, request) }
	default:
		return fmt.Errorf("unknown kind of load %q", *kind)
	}
	in := bufio.NewReader(os.Stdin)
	if err := l.warm(); err != nil {
		return fmt.Errorf("warming up: %w", err)
	}
	fmt.Println("warm")
	if _, err := in.ReadString('\n'); err != nil {
		return err
	}
	if err := l.run(); err != nil {
		return err
	}
	done := "done"
	if l.report != nil {
		done += " " + l.report()
	}
	fmt.Println(done)
	io.Copy(io.Discard, in)
	return nil
}

// inParallel calls fn n times, with the serial number of the call, from a number of workers. It returns the workers' errors.
func inParallel(workers int, n int64, fn func(serial int64) error) error {
	var next atomic.Int64
	errs := make([]error, workers)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for serial := next.Add(1); serial <= n && errs[w] == nil; serial = next.Add(1) {
				errs[w] = fn(serial)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// destination is where the load connects to; invalid: to the workload in the pod, from loadSources.
var destination netip.AddrPort

func dial(serial int64, port int) (*net.TCPConn, error) {
	dialer, to := net.Dialer{Timeout: 10 * time.Second}, destination
	if !to.IsValid() {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(loadSources[serial%int64(len(loadSources))])}
		to = netip.AddrPortFrom(nettest.PodIP4, uint16(port))
	}
	conn, err := dialer.Dial("tcp4", to.String())
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(2 * time.Minute)) // longer than any measurement
	return conn.(*net.TCPConn), nil
}

func downloadOnce(bytes int64) error {
	conn, err := dial(0, downloadPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := binary.Write(conn, binary.BigEndian, bytes); err != nil {
		return err
	}
	if got := readBytes(conn); got != bytes {
		return fmt.Errorf("downloaded %d bytes of %d", got, bytes)
	}
	return nil
}

func uploadOnce(bytes int64) error {
	conn, err := dial(0, uploadPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	writeBytes(conn, bytes)
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	var got int64
	if err := binary.Read(conn, binary.BigEndian, &got); err != nil {
		return fmt.Errorf("reading the workload's count: %w", err)
	}
	if got != bytes {
		return fmt.Errorf("uploaded %d bytes, the workload had %d", bytes, got)
	}
	return nil
}

// exchangeOnce opens a connection, exchanges one message and closes it.
func exchangeOnce(serial int64) error {
	conn, err := dial(serial, echoPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	return exchange(conn)
}

func exchange(conn net.Conn) error {
	var message [messageSize]byte
	if _, err := conn.Write(message[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, message[:])
	return err
}

// messagesLoad exchanges messages on long connections, one worker per connection.
func messagesLoad(connections int, messages int64) load {
	conns := make([]*net.TCPConn, connections)
	each := func(n int64) error {
		return inParallel(connections, int64(connections), func(serial int64) error {
			for range n / int64(connections) {
				if err := exchange(conns[serial-1]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return load{
		warm: func() (err error) {
			for i := range conns {
				if conns[i], err = dial(int64(i), echoPort); err != nil {
					return err
				}
			}
			return each(min(messages, 2000))
		},
		run: func() error { return each(messages) },
	}
}

// openIdle opens connections to a port, uses each once and leaves them open.
func openIdle(workers int, connections int64, port int, use func(net.Conn) error) error {
	return keepIdle(workers, connections, use, func(serial int64) (net.Conn, error) { return dial(serial, port) })
}

func keepIdle(workers int, connections int64, use func(net.Conn) error, dial func(serial int64) (net.Conn, error)) error {
	kept := make([]net.Conn, connections)
	err := inParallel(workers, connections, func(serial int64) (err error) {
		if kept[serial-1], err = dial(serial); err != nil {
			return err
		}
		return use(kept[serial-1])
	})
	idle = kept
	return err
}

// exchangeThrice moves a few bytes each way.
func exchangeThrice(conn net.Conn) error {
	for range 3 {
		if err := exchange(conn); err != nil {
			return err
		}
	}
	return nil
}

// idle keeps the connections of openIdle reachable, because the garbage collector would close them.
var idle []net.Conn
