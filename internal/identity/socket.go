package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/grpcwire"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// Where platforms mount the SPIFFE workload socket, below the root directory, and the name that it has by default.
const (
	socketDirectory = "var/run/secrets/workload-spiffe-uds"
	socketName      = "socket"
)

// StreamSecrets is the path of the method of Envoy's secret discovery service that Socket calls. SPIRE's agent does not
// have the delta method.
const StreamSecrets = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Names of the secrets, as Istio's configuration has them.
const (
	certificateSecret = "default"
	rootsSecret       = "ROOTCA"
)

// Socket is a SPIFFE workload socket: a process of the node, such as SPIRE's agent, serves the identity, and pushes a new
// one when it has renewed it.
type Socket struct {
	Path string // of the Unix socket
	Node []byte // encoded envoy.config.core.v3.Node; may be nil

	client  *grpcwire.Client
	stream  *grpcwire.Stream // nil: there is no open stream
	answer  secretRequest    // to the last response of the stream
	secrets *secrets         // in force
	current *Identity        // the last identity; nil before the first
}

// secrets is what an identity is made of, in PEM. Each is nil before it has come.
type secrets struct{ chain, key, roots []byte }

// Format writes the path for every verb, so that the key is in no log.
func (s Socket) Format(f fmt.State, _ rune) { io.WriteString(f, "workload socket "+s.Path) }

// FindSocket returns the workload socket below the directory root, if there is one and a server of HTTP/2 answers at it.
// name is that of the file; empty stands for the usual name. If another one is given, its absence is an error.
func FindSocket(ctx context.Context, root, name string) (*Socket, error) {
	if name == "" {
		name = socketName
	}
	if name != filepath.Base(name) || name == "." || name == ".." {
		return nil, fmt.Errorf("workload socket %q is not the name of a file; use one without a directory", name)
	}
	path := filepath.Join(root, socketDirectory, name)
	err := probe(ctx, path)
	switch {
	case err == nil:
		return &Socket{Path: path}, nil
	case name == socketName:
		return nil, nil
	}
	return nil, fmt.Errorf("workload socket %s: %w", path, err)
}

// probeTimeout is how long a server has to answer a new connection.
const probeTimeout = time.Second

// probe opens a connection and waits for the server's SETTINGS frame, with which each connection of HTTP/2 begins.
func probe(ctx context.Context, path string) error {
	if info, err := os.Stat(path); err != nil {
		return err
	} else if info.Mode().Type() != os.ModeSocket {
		return errors.New("it is not a socket")
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	if _, err := io.WriteString(conn, preface+settings); err != nil {
		return err
	}
	var header [9]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return fmt.Errorf("it does not answer: %w", err)
	}
	if header[3] != 4 || header[4]&1 != 0 {
		return errors.New("it does not serve HTTP/2")
	}
	return nil
}

// firstAnswer is how long a new stream may take to bring an identity. It is Envoy's time for the first secret.
const firstAnswer = 15 * time.Second

// Fetch returns the first identity of the socket, and then each one that differs from the one before. It waits for it, on
// one stream that ends with ctx. After an error of the stream the next call opens another one.
func (s *Socket) Fetch(ctx context.Context) (*Identity, error) {
	patience := firstAnswer
	if s.stream == nil {
		if err := s.open(ctx); err != nil {
			return nil, err
		}
	} else {
		// A server that has stopped pushing is asked again while there is time.
		patience = max(time.Until(s.current.NotAfter())/2, time.Minute)
	}
	stream := s.stream
	late := time.AfterFunc(patience, stream.Close)
	defer late.Stop()
	for {
		identity, err := s.next()
		if err == nil && identity == nil {
			continue
		}
		if s.stream == nil && !late.Stop() && ctx.Err() == nil {
			err = fmt.Errorf("workload socket %s: no identity within %v", s.Path, patience.Round(time.Second))
		}
		return identity, err
	}
}

// Next returns 0: Fetch waits for the next identity.
func (s *Socket) Next(*Identity) time.Duration { return 0 }

// open opens a stream and asks for both secrets.
func (s *Socket) open(ctx context.Context) error {
	if s.client == nil {
		transport := &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", s.Path)
			},
			Protocols: new(http.Protocols),
			HTTP2:     &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 10 * time.Second},
		}
		transport.Protocols.SetUnencryptedHTTP2(true)
		s.client = &grpcwire.Client{Transport: transport, Base: url.URL{Scheme: "http", Host: "localhost"}, MaxMessage: maxFile}
	}
	stream, err := s.client.Stream(ctx, StreamSecrets)
	if err != nil {
		return err
	}
	s.stream, s.secrets, s.answer = stream, new(secrets), secretRequest{node: s.Node}
	return s.send()
}

func (s *Socket) send() error {
	if err := s.stream.Send(s.answer.encode()); err != nil {
		if _, status := s.stream.Receive(); status != nil && status != io.EOF {
			err = status
		}
		return s.lost(err)
	}
	s.answer.node = nil
	return nil
}

// lost closes the stream.
func (s *Socket) lost(err error) error {
	s.stream.Close()
	s.stream = nil
	if err == io.EOF {
		err = errors.New("the stream was closed")
	}
	return fmt.Errorf("workload socket %s: %w", s.Path, err)
}

// next reads a response, answers it and returns the identity that it brings: nil without an error if it brings no other
// one, or a part of one.
func (s *Socket) next() (*Identity, error) {
	message, err := s.stream.Receive()
	if err != nil {
		return nil, s.lost(err)
	}
	response, err := decodeSecrets(message, *s.secrets)
	s.answer.nonce = response.nonce
	var identity *Identity
	if err == nil {
		identity, err = s.identity(response.secrets)
	}
	if err != nil {
		s.answer.rejection = err.Error()
		if lost := s.send(); lost != nil {
			return nil, lost
		}
		return nil, fmt.Errorf("workload socket %s: %w", s.Path, err)
	}
	s.answer.version, s.answer.rejection = response.version, ""
	s.secrets = &response.secrets
	if identity != nil {
		s.current = identity
	}
	return identity, s.send()
}

// identity returns the identity that secrets make, or nil if they are incomplete or those of the current one.
func (s *Socket) identity(next secrets) (*Identity, error) {
	if next.chain == nil || next.roots == nil || next.equal(*s.secrets) {
		return nil, nil
	}
	return parseIdentity(next.chain, next.key, next.roots, certificateSecret, rootsSecret)
}

func (s secrets) equal(other secrets) bool {
	return bytes.Equal(s.chain, other.chain) && bytes.Equal(s.key, other.key) && bytes.Equal(s.roots, other.roots)
}

// secretRequest is an envoy.service.discovery.v3.DiscoveryRequest for both secrets.
type secretRequest struct {
	node                      []byte // in the first request of a stream
	version, nonce, rejection string
}

func (r *secretRequest) encode() []byte {
	b := wire.AppendString(nil, 1, r.version)
	if r.node != nil {
		b = wire.AppendBytes(b, 2, r.node)
	}
	b = wire.AppendString(b, 3, certificateSecret)
	b = wire.AppendString(b, 3, rootsSecret)
	b = wire.AppendString(b, 4, secretType)
	b = wire.AppendString(b, 5, r.nonce)
	if r.rejection != "" {
		status := wire.AppendVarint(nil, 1, uint64(envoy.GRPCInvalidArgument))
		b = wire.AppendBytes(b, 6, wire.AppendString(status, 2, r.rejection))
	}
	return b
}

// secretResponse is an envoy.service.discovery.v3.DiscoveryResponse, with the secrets that are in force after it.
type secretResponse struct {
	version, nonce string
	secrets        secrets
}

// decodeSecrets decodes a response. Secrets that it leaves out stay as they are. After an error the nonce is valid if it
// could be read.
func decodeSecrets(message []byte, before secrets) (secretResponse, error) {
	r := secretResponse{secrets: before}
	var err error
	var resources [][]byte
	m := wire.Read(message, &err)
	for m.Next() {
		switch m.Number {
		case 1:
			r.version = m.String()
		case 2:
			resources = append(resources, m.Bytes())
		case 5:
			r.nonce = m.String()
		}
	}
	if err != nil {
		return r, fmt.Errorf("the response: %w", err)
	}
	for _, resource := range resources {
		if err := r.secrets.add(resource); err != nil {
			return r, err
		}
	}
	return r, nil
}

// add decodes a google.protobuf.Any with a secret.
func (s *secrets) add(resource []byte) error {
	var err error
	var url string
	var value []byte
	for m := wire.Read(resource, &err); m.Next(); {
		switch m.Number {
		case 1:
			url = m.String()
		case 2:
			value = m.Bytes()
		}
	}
	if err == nil && url != secretType {
		return fmt.Errorf("a resource of type %.200q, want a secret", url)
	}
	var name string
	var certificate, validation []byte
	for m := wire.Read(value, &err); m.Next(); {
		switch m.Number {
		case 1:
			name = m.String()
		case 2:
			certificate = m.Bytes()
		case 4:
			validation = m.Bytes()
		}
	}
	switch {
	case err != nil:
		return fmt.Errorf("a secret: %w", err)
	case name == certificateSecret:
		s.chain, err = decodeData(certificate, 1)
		if err == nil {
			s.key, err = decodeData(certificate, 2)
		}
	case name == rootsSecret:
		s.roots, err = decodeData(validation, 1)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// decodeData returns the content of a field of type envoy.config.core.v3.DataSource.
func decodeData(message []byte, number int) ([]byte, error) {
	var err error
	var data []byte
	for m := wire.Read(message, &err); m.Next(); {
		if m.Number != number {
			continue
		}
		for source := m.Message(); source.Next(); {
			if source.Number == 2 || source.Number == 3 { // inline_bytes, inline_string
				data = slices.Clone(source.Bytes())
			}
		}
	}
	if err == nil && len(data) == 0 {
		err = fmt.Errorf("field %d has no inline content", number)
	}
	return data, err
}
