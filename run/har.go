package run

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
)

// harFile writes requests as an HTTP Archive, version 1.2. The developer tools of browsers open it. The file is complete
// after each entry, whatever ends the process, as the next one is written over its end. A pipe is complete when it is closed.
type harFile struct {
	file    *os.File
	pipe    bool
	length  int64 // without harEnd
	entries int
	limit   int  // bytes of a decoded body
	mask    bool // credentials in bodies
}

type harCreator struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// harEntry is an entry of the archive. Sizes are -1 if they are not known.
type harEntry struct {
	Started  string      `json:"startedDateTime"`
	Time     float64     `json:"time"`
	Request  harRequest  `json:"request"`
	Response harResponse `json:"response"`
	Cache    struct{}    `json:"cache"`
	Timings  harTimings  `json:"timings"`
	Server   string      `json:"serverIPAddress,omitempty"`
	Port     string      `json:"connection,omitempty"` // of the client
	Comment  string      `json:"comment,omitempty"`    // the reason of a failure
}

type harRequest struct {
	Method      string     `json:"method"`
	URL         string     `json:"url"`
	Version     string     `json:"httpVersion"`
	Cookies     []harField `json:"cookies"`
	Headers     []harField `json:"headers"`
	Query       []harField `json:"queryString"`
	HeadersSize int        `json:"headersSize"`
	BodySize    int64      `json:"bodySize"`

	PostData *harPostData `json:"postData,omitempty"`
}

// harPostData is the body of a request. The format has no encoding for it; _encoding is a field of our own.
type harPostData struct {
	MimeType string     `json:"mimeType"`
	Params   []harField `json:"params"`
	Text     string     `json:"text"`
	Encoding string     `json:"_encoding,omitempty"`
	Comment  string     `json:"comment,omitempty"`
}

type harResponse struct {
	Status      int        `json:"status"`
	StatusText  string     `json:"statusText"`
	Version     string     `json:"httpVersion"`
	Cookies     []harField `json:"cookies"`
	Headers     []harField `json:"headers"`
	Content     harContent `json:"content"`
	Redirect    string     `json:"redirectURL"`
	HeadersSize int        `json:"headersSize"`
	BodySize    int64      `json:"bodySize"`
}

type harContent struct {
	Size        int64  `json:"size"`
	Compression int64  `json:"compression,omitempty"` // bytes saved
	MimeType    string `json:"mimeType"`
	Text        string `json:"text,omitempty"`
	Encoding    string `json:"encoding,omitempty"`
	Comment     string `json:"comment,omitempty"`
}

type harField struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type harTimings struct {
	Send    float64 `json:"send"`
	Wait    float64 `json:"wait"`
	Receive float64 `json:"receive"`
}

func openHAR(path, version string, limit int, mask bool) (*harFile, error) {
	file, err := createPrivate("record", path)
	if err != nil {
		return nil, err
	}
	h := &harFile{file: file, limit: limit, mask: mask}
	h.pipe = h.seek() != nil
	creator, err := json.Marshal(harCreator{"pillion", version})
	if err == nil {
		err = h.add(`{"log":{"version":"1.2","creator":` + string(creator) + `,"entries":[`)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return h, nil
}

// write implements output.
func (h *harFile) write(r *event) error {
	if r.har == nil {
		return nil
	}
	r.bodies.addTo(r.har, h.limit, h.mask)
	text, err := json.Marshal(r.har)
	if err != nil {
		return err
	}
	separator := "\n"
	if h.entries++; h.entries > 1 {
		separator = ",\n"
	}
	return h.add(separator + string(text))
}

// harEnd is behind the entries.
const harEnd = "\n]}}\n"

func (h *harFile) add(text string) (err error) {
	if h.pipe {
		_, err = h.file.WriteString(text)
		return err
	}
	if err = h.seek(); err != nil {
		return err
	}
	if _, err = h.file.WriteString(text + harEnd); err != nil { // such as for want of space: a part may be written
		if h.seek() == nil {
			_, _ = h.file.WriteString(harEnd)
			_ = h.file.Truncate(h.length + int64(len(harEnd)))
		}
		return err
	}
	h.length += int64(len(text))
	return nil
}

// seek moves to the end of the entries. Pipes have no place to move to.
func (h *harFile) seek() error {
	_, err := h.file.Seek(h.length, io.SeekStart)
	return err
}

func (h *harFile) close() (err error) {
	if h.pipe {
		_, err = h.file.WriteString(harEnd)
	}
	if closeErr := h.file.Close(); err == nil {
		err = closeErr
	}
	return err
}

// harOf returns the entry of a request, and nil for other records. Credentials are masked if mask is set.
func harOf(r *flow.Record, shown *live.Record, mask bool) *harEntry {
	if !r.IsRequest() {
		return nil
	}
	version := shown.Protocol
	milliseconds := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	requestHead, responseHead := headFields(r.HTTP.Head, mask), headFields(r.HTTP.ResponseHead, mask)
	target := harURL(r, shown, mask)
	e := &harEntry{
		Started: r.Opened.Format("2006-01-02T15:04:05.000Z07:00"), Time: milliseconds(r.Duration),
		Request: harRequest{
			Method: shown.Method, URL: target.String(), Version: version, Cookies: []harField{}, Headers: requestHead, Query: queryFields(target),
			HeadersSize: sizeOf(r.HTTP.Head), BodySize: int64(shown.Received),
		},
		Response: harResponse{
			Status: shown.Status, StatusText: http.StatusText(shown.Status), Version: version, Cookies: []harField{}, Headers: responseHead,
			Content:  harContent{Size: int64(shown.Sent), MimeType: valueOf(responseHead, "content-type")},
			Redirect: valueOf(responseHead, "location"), HeadersSize: sizeOf(r.HTTP.ResponseHead), BodySize: int64(shown.Sent),
		},
		Timings: harTimings{Wait: milliseconds(r.HTTP.ServiceTime), Receive: milliseconds(r.Duration - r.HTTP.ServiceTime)},
	}
	if host, _, err := net.SplitHostPort(shown.Destination); err == nil {
		e.Server = host
	}
	e.Port = strconv.Itoa(int(r.Downstream.Port()))
	if shown.Failed {
		e.Comment = strings.TrimSpace(shown.Cause() + " " + shown.Failure)
	}
	return e
}

func sizeOf(head []byte) int {
	if head == nil {
		return -1
	}
	return len(head)
}

// harURL returns the URL of a request.
func harURL(r *flow.Record, shown *live.Record, mask bool) *url.URL {
	u := &url.URL{Scheme: "http", Host: shown.Authority}
	if r.Security != nil {
		u.Scheme = "https"
	}
	if u.Host == "" {
		u.Host = shown.Destination
	}
	path, query, found := strings.Cut(shown.Path, "?")
	if shown.Method == http.MethodConnect { // its target is the authority
		path = ""
	}
	if parsed, err := url.Parse(path); err == nil && parsed.Scheme != "" {
		u.Scheme, u.Host, path = parsed.Scheme, parsed.Host, parsed.EscapedPath()
	}
	if unescaped, err := url.PathUnescape(path); err == nil {
		u.Path, u.RawPath = unescaped, path
	} else {
		u.Path = path
	}
	if u.RawQuery = query; mask && found {
		u.RawQuery = maskQuery(query)
	}
	return u
}

func queryFields(u *url.URL) []harField {
	fields := []harField{}
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		fields = append(fields, harField{unescape(name), unescape(value)})
	}
	return fields
}

func unescape(text string) string {
	if plain, err := url.QueryUnescape(text); err == nil {
		return plain
	}
	return text
}

// headFields parses a head. The request or status line of HTTP/1 is left out, pseudo-header fields are kept.
func headFields(head []byte, mask bool) []harField {
	fields := []harField{}
	for line := range bytes.Lines(head) {
		line = bytes.TrimRight(line, "\r\n")
		i := bytes.IndexByte(line, ':')
		if i == 0 { // of HTTP/2
			i = bytes.IndexByte(line[1:], ':') + 1
		}
		if i <= 0 || bytes.IndexByte(line[:i], ' ') >= 0 {
			continue
		}
		name, value := string(line[:i]), strings.TrimSpace(string(line[i+1:]))
		switch {
		case !mask:
		case secretField(name):
			value = masked
		case name == ":path":
			if path, query, found := strings.Cut(value, "?"); found {
				value = path + "?" + maskQuery(query)
			}
		}
		fields = append(fields, harField{name, value})
	}
	return fields
}

func valueOf(fields []harField, name string) string {
	for _, f := range fields {
		if strings.EqualFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}
