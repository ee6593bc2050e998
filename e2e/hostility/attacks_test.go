package hostility

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// attack is one kind of hostility: a number of connections, each served by a function until it is cut off. Connections
// that the agent ends are opened again. The short form has at most shortForm of them.
//
// An attack of valid requests makes work for the origin, with and without the agent. The client that goes past the agent asks
// the origin itself then. Floods, on the other hand, are for the agent to stop, and that client asks the bystander.
type attack struct {
	name        string
	connections int
	past        string                            // where the other client sends requests past the agent
	carry       func(conn net.Conn, begun func()) // calls begun when the connection is at its worst
	of          kind
}

// kind is what is attacked.
type kind uint8

const (
	alone   kind = iota // an agent without a control plane
	inMesh              // an agent with a control plane, which is reached by TLS
	gateway             // a gateway, which is reached by TLS
)

var attacks = []attack{
	{"fields repeated by their HPACK index", 4, directAddress, repeatedFields, alone},
	{"unfinished heads of 250 KiB", 600, bystanderAddress, unfinishedHead, alone},
	{"heads of 250 KiB without a response", 600, directAddress, unansweredHead, alone},
	{"unfinished header blocks of 250 KiB", 600, bystanderAddress, unfinishedBlock, alone},
	{"first bytes that do not decide", 2000, bystanderAddress, undecided, alone},
	{"stalled windows", 50, directAddress, stalledWindow, alone},
	{"stalled downloads", 1000, directAddress, stalledDownload, alone},
	{"stalled downloads over HTTP/2", 1000, directAddress, stalledDownload2, alone},
	{"slow heads, a byte a second", 2000, bystanderAddress, slowHead, alone},
	{"rapid reset", 20, bystanderAddress, rapidReset, alone},
	{"CONTINUATION flood", 20, bystanderAddress, continuationFlood, alone},
	{"PING flood", 20, bystanderAddress, flood(http2.FramePing, 8), alone},
	{"SETTINGS flood", 20, bystanderAddress, flood(http2.FrameSettings, 6), alone},
	{"GOAWAY flood", 20, bystanderAddress, flood(http2.FrameGoAway, 8), alone},
	{"interim responses without end", 50, directAddress, interimResponses, alone},
	{"silent connections", 9000, bystanderAddress, silent, alone},
	{"stalled handshakes of TLS", 2000, bystanderAddress, stalledHandshake, inMesh},
	{"slow heads at a gateway", 2000, bystanderAddress, secured(slowHead), gateway},
	{"slow bodies at a gateway", 2000, bystanderAddress, secured(slowBody), gateway},
	{"stalled handshakes at a gateway", 2000, bystanderAddress, stalledHandshake, gateway},
	{"rapid reset of routed streams", 20, bystanderAddress, secured(rapidReset, "h2"), gateway},
	{"CONTINUATION flood, routed", 20, bystanderAddress, secured(continuationFlood, "h2"), gateway},
	{"SETTINGS flood, routed", 20, bystanderAddress, secured(flood(http2.FrameSettings, 6), "h2"), gateway},
	{"unfinished header blocks, routed", 200, bystanderAddress, secured(unfinishedBlock, "h2"), gateway},
	{"fields repeated by their HPACK index, routed", 4, directAddress, secured(repeatedFields, "h2"), gateway},
	{"stalled windows, routed", 50, directAddress, secured(stalledWindow, "h2"), gateway},
	{"stalled windows, routed over HTTP/2", 50, directAddress, secured(stalledCalls, "h2"), gateway},
	{"stalled downloads, routed over HTTP/2", 200, directAddress, secured(stalledDownload2, "h2"), gateway},
	{"stalled downloads at a gateway", 1000, directAddress, secured(stalledDownload), gateway},
	{"unfinished records at a gateway", 2000, bystanderAddress, unfinishedRecord, gateway},
	{"ClientHellos without end at a gateway", 2000, bystanderAddress, unfinishedHello, gateway},
	{"garbage inside TLS at a gateway", 50, bystanderAddress, secured(garbage), gateway},
	{"garbage behind handshakes at a gateway", 50, bystanderAddress, garbageRecord, gateway},
}

const shortForm = 4000

// shorter has attacks with fewer connections in the short form: each is a handshake, a download, or a head that the
// server parses, also for the race detector.
var shorter = map[string]int{
	"heads of 250 KiB without a response":   300,
	"unfinished records at a gateway":       1000,
	"stalled downloads, routed over HTTP/2": 30,
	"stalled downloads at a gateway":        200,
}

// runAttack attacks until its standard input ends. It prints "ready" when every connection has been at its worst. pause is
// the time before a connection that the agent has ended is opened again, and most the largest number of connections.
func runAttack(name, pause, most string) {
	duration, err := time.ParseDuration(pause)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	limit, err := strconv.Atoi(most)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var files syscall.Rlimit // the agent, with the same limit, needs two descriptors for a connection
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files) == nil {
		limit = min(limit, int(files.Max)/2-200)
	}
	for _, a := range attacks {
		if a.name == name {
			a.connections = min(a.connections, limit)
			go a.run(duration)
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}
	}
	fmt.Fprintf(os.Stderr, "unknown attack %q\n", name)
	os.Exit(1)
}

func (a *attack) run(pause time.Duration) {
	var all sync.WaitGroup
	dialling := make(chan struct{}, 200)
	for range a.connections {
		all.Add(1)
		go func() {
			begun := sync.OnceFunc(all.Done)
			for next := time.NewTicker(pause); ; <-next.C {
				dialling <- struct{}{}
				conn, err := net.DialTimeout("tcp", originAddress, 10*time.Second)
				<-dialling
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					continue
				}
				_ = conn.(*net.TCPConn).SetLinger(0) // a reset leaves no connection in TIME_WAIT, which would use up the ports
				a.carry(conn, begun)
				begun()
				conn.Close()
			}
		}()
	}
	all.Wait()
	fmt.Println("ready")
}

// drain reads until the agent ends the connection.
func drain(conn net.Conn) { io.Copy(io.Discard, conn) }

// stay waits until the agent ends the connection, and reads nothing before.
func stay(conn net.Conn) {
	if secured, ok := conn.(*tls.Conn); ok {
		conn = secured.NetConn()
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return
	}
	const established = 1
	for pause := time.NewTicker(time.Second); ; <-pause.C {
		ended := true
		_ = raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			ended = err != nil || info.State != established
		})
		if ended {
			return
		}
	}
}

var (
	largeHead    = []byte("GET /never HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 250<<10))
	largeRequest = append(bytes.Clone(largeHead), "\r\n\r\n"...)
)

func unfinishedHead(conn net.Conn, begun func()) {
	if _, err := conn.Write(largeHead); err == nil {
		begun()
		drain(conn)
	}
}

func unansweredHead(conn net.Conn, begun func()) {
	if _, err := conn.Write(largeRequest); err == nil {
		begun()
		drain(conn)
	}
}

func undecided(conn net.Conn, begun func()) {
	if _, err := conn.Write([]byte("GET /" + strings.Repeat("x", 15<<10))); err == nil {
		begun()
		drain(conn)
	}
}

func slowHead(conn net.Conn, begun func()) {
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: a\r\nX: ")); err != nil {
		return
	}
	begun()
	for range time.NewTicker(time.Second).C {
		if _, err := conn.Write([]byte("x")); err != nil {
			return
		}
	}
}

func slowBody(conn net.Conn, begun func()) {
	if _, err := io.WriteString(conn, "POST /never HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"); err != nil {
		return
	}
	begun()
	for range time.NewTicker(time.Second).C {
		if _, err := conn.Write([]byte("x")); err != nil {
			return
		}
	}
}

func silent(conn net.Conn, begun func()) {
	begun()
	drain(conn)
}

func stalledDownload(conn net.Conn, begun func()) {
	if _, err := io.WriteString(conn, "GET /large HTTP/1.1\r\nHost: a\r\n\r\n"); err == nil {
		begun()
		stay(conn)
	}
}

func interimResponses(conn net.Conn, begun func()) {
	if _, err := io.WriteString(conn, "GET /interim HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); err != nil {
		return
	}
	if _, err := io.CopyN(io.Discard, conn, 64<<10); err == nil {
		begun()
		drain(conn)
	}
}

// peer2 is the client's side of an HTTP/2 connection.
type peer2 struct {
	net.Conn
	*http2.Framer
	encoder *hpack.Encoder
	block   bytes.Buffer
}

func begin2(conn net.Conn, settings ...http2.Setting) *peer2 {
	p := &peer2{Conn: conn, Framer: http2.NewFramer(conn, conn)}
	p.AllowIllegalWrites = true
	p.encoder = hpack.NewEncoder(&p.block)
	io.WriteString(conn, http2.ClientPreface)
	p.WriteSettings(settings...)
	return p
}

// request sends the head of a request, of which the end is open.
func (p *peer2) request(stream uint32, path string, more ...hpack.HeaderField) error {
	return p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: p.fields(path, more...), EndHeaders: true, EndStream: path == "/large"})
}

func (p *peer2) fields(path string, more ...hpack.HeaderField) []byte {
	p.block.Reset()
	method := "POST"
	if path == "/large" {
		method = "GET"
	}
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: method}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "a"},
	}, more...) {
		p.encoder.WriteField(f)
	}
	return p.block.Bytes()
}

func repeatedFields(conn net.Conn, begun func()) {
	p := begin2(conn)
	go drain(conn)
	long := hpack.HeaderField{Name: "x-forwarded-for", Value: strings.Repeat("203.0.113.7,", 325)}
	var fields []hpack.HeaderField
	for range 60 {
		fields = append(fields, long)
	}
	for i := range uint32(1500) {
		if p.request(2*i+1, "/never", fields...) != nil {
			return
		}
	}
	begun()
	for range time.NewTicker(time.Second).C {
		if p.WritePing(false, [8]byte{}) != nil {
			return
		}
	}
}

func unfinishedBlock(conn net.Conn, begun func()) {
	p := begin2(conn)
	block := append(p.fields("/"), "\x10\x01x\x7f\x81\x9e\x0f"...) // a literal of 250 KiB, of which not all will come
	err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block})
	piece := make([]byte, 16<<10)
	for range 15 {
		if err == nil {
			err = p.WriteContinuation(1, false, piece)
		}
	}
	if err == nil {
		begun()
		drain(conn)
	}
}

// stalledWindow opens streams whose responses may send no byte.
func stalledWindow(conn net.Conn, begun func()) { stall(conn, begun) }

// stalledCalls is stalledWindow with calls of gRPC, which stay HTTP/2 on their way to the origin.
func stalledCalls(conn net.Conn, begun func()) {
	stall(conn, begun, hpack.HeaderField{Name: "content-type", Value: "application/grpc"})
}

func stall(conn net.Conn, begun func(), more ...hpack.HeaderField) {
	p := begin2(conn, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	go drain(conn)
	for i := range uint32(1000) {
		if p.request(2*i+1, "/large", more...) != nil {
			return
		}
	}
	begun()
	for range time.NewTicker(time.Second).C {
		if p.WritePing(false, [8]byte{}) != nil {
			return
		}
	}
}

// stalledDownload2 gives all the credit that there is, and reads nothing.
func stalledDownload2(conn net.Conn, begun func()) {
	p := begin2(conn, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	p.WriteWindowUpdate(0, 1<<31-1-65535)
	for i := range uint32(10) {
		if p.request(2*i+1, "/large") != nil {
			return
		}
	}
	begun()
	stay(conn)
}

func rapidReset(conn net.Conn, begun func()) {
	p := begin2(conn)
	go drain(conn)
	for stream := uint32(1); ; stream += 2 {
		if p.request(stream, "/never") != nil || p.WriteRSTStream(stream, http2.ErrCodeCancel) != nil {
			return
		}
		if stream == 1001 {
			begun()
		}
	}
}

func continuationFlood(conn net.Conn, begun func()) {
	p := begin2(conn)
	go drain(conn)
	err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.fields("/")})
	for i := 0; err == nil; i++ {
		err = p.WriteContinuation(1, false, nil)
		if i == 1000 {
			begun()
		}
	}
}

// flood sends frames of one type without end.
func flood(of http2.FrameType, size int) func(net.Conn, func()) {
	return func(conn net.Conn, begun func()) {
		begin2(conn)
		go drain(conn)
		frame := append([]byte{0, 0, byte(size), byte(of), 0, 0, 0, 0, 0}, make([]byte, size)...)
		if of == http2.FrameSettings {
			frame[10] = byte(http2.SettingMaxConcurrentStreams)
		}
		many := bytes.Repeat(frame, 100)
		for i := 0; ; i++ {
			if _, err := conn.Write(many); err != nil {
				return
			}
			if i == 100 {
				begun()
			}
		}
	}
}
