package route

import (
	"net/netip"
	"strings"
)

// fieldList are the fields of a test: names and values in turn.
type fieldList []string

func (f fieldList) Len() int { return len(f) / 2 }

func (f fieldList) At(i int) (name, value []byte) { return []byte(f[2*i]), []byte(f[2*i+1]) }

// request returns a request such as "GET http://host/path", with fields.
func request(line string, fields ...string) *Request {
	method, url, _ := strings.Cut(line, " ")
	r := &Request{
		Method: []byte(method), Fields: fieldList(fields),
		Downstream: netip.MustParseAddrPort("198.51.100.7:41234"), Local: netip.MustParseAddrPort("203.0.113.1:80"),
	}
	if scheme, rest, absolute := strings.Cut(url, "://"); absolute {
		r.Scheme = []byte(scheme)
		end := strings.IndexAny(rest, "/?#")
		if end < 0 {
			end = len(rest)
		}
		r.Authority, url = []byte(rest[:end]), rest[end:]
	}
	r.Path = []byte(url)
	return r
}

// draw returns a source of random numbers that yields numbers, and then 0.
func draw(numbers ...uint64) func() uint64 {
	return func() (n uint64) {
		if len(numbers) > 0 {
			n, numbers = numbers[0], numbers[1:]
		}
		return n
	}
}
