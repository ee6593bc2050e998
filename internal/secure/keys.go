package secure

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"hash"
)

// secrets takes the traffic secrets of a TLS 1.3 handshake from the key log of crypto/tls, its only way to give them out.
// They stay in this process. The zero value is ready for use.
type secrets struct{ client, server []byte }

// Write implements the key log: lines with a label, the client's random and a secret.
func (s *secrets) Write(line []byte) (int, error) {
	label, rest, _ := bytes.Cut(line, []byte(" "))
	var to *[]byte
	switch string(label) {
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		to = &s.server
	default:
		return len(line), nil
	}
	_, text, _ := bytes.Cut(rest, []byte(" "))
	secret, err := hex.AppendDecode(nil, bytes.TrimSuffix(text, []byte("\n")))
	if *to = secret; err != nil {
		*to = nil
	}
	return len(line), nil
}

// suite is a cipher suite of TLS 1.3 with AES-GCM.
type suite struct {
	hash func() hash.Hash
	key  int // bytes
}

var (
	aes128 = &suite{sha256.New, 16}
	aes256 = &suite{sha512.New384, 32}
)

// suiteOf returns the suite whose records are protected here; nil: crypto/tls protects them.
func suiteOf(session *Session) *suite {
	if session.Version != tls.VersionTLS13 || fips140.Enabled() { // FIPS 140 allows AES-GCM of TLS inside crypto/tls only
		return nil
	}
	switch session.Suite {
	case tls.TLS_AES_128_GCM_SHA256:
		return aes128
	case tls.TLS_AES_256_GCM_SHA384:
		return aes256
	}
	return nil
}

// expand is HKDF-Expand-Label with an empty context (RFC 8446 §7.1).
func (s *suite) expand(secret []byte, label string, size int) ([]byte, error) {
	const prefix = "tls13 "
	info := binary.BigEndian.AppendUint16(nil, uint16(size))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(info, prefix+label+"\x00"...)
	return hkdf.Expand(s.hash, secret, string(info), size)
}

// direction protects the records of one direction.
type direction struct {
	suite  *suite
	secret []byte
	aead   cipher.AEAD
	iv     [12]byte
	nonce  [12]byte // of the last record
	number uint64   // of the next record under this key
}

// begin sets the traffic secret and the keys that follow from it (RFC 8446 §7.3).
func (d *direction) begin(s *suite, secret []byte) error {
	key, err := s.expand(secret, "key", s.key)
	if err != nil {
		return err
	}
	iv, err := s.expand(secret, "iv", len(d.iv))
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	d.suite, d.secret, d.number = s, secret, 0
	copy(d.iv[:], iv)
	copy(d.nonce[:], iv)
	d.aead, err = cipher.NewGCM(block)
	return err
}

// update goes on to the next traffic secret (RFC 8446 §7.2).
func (d *direction) update() error {
	next, err := d.suite.expand(d.secret, "traffic upd", len(d.secret))
	if err != nil {
		return err
	}
	return d.begin(d.suite, next)
}

// next returns the nonce of the next record (RFC 8446 §5.3). It is valid until the next call.
func (d *direction) next() []byte {
	binary.BigEndian.PutUint64(d.nonce[4:], binary.BigEndian.Uint64(d.iv[4:])^d.number)
	d.number++
	return d.nonce[:]
}
