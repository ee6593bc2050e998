package http2

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// list makes fields of "name=value name=value".
func list(text string) (fields []Field) {
	for word := range strings.FieldsSeq(text) {
		pseudo := strings.HasPrefix(word, ":")
		name, value, _ := strings.Cut(strings.TrimPrefix(word, ":"), "=")
		if pseudo {
			name = ":" + name
		}
		fields = append(fields, Field{Name: name, Value: strings.ReplaceAll(value, "_", " ")})
	}
	return fields
}

const get = ":method=GET :scheme=http :path=/a :authority=b "

func TestRequests(t *testing.T) {
	for _, c := range []struct {
		fields string
		want   error
	}{
		{get, nil},
		{get + "a=b a=c cookie=x te=trailers", nil},
		{":authority=b :path=* :scheme=https :method=OPTIONS", nil},
		{":method=GET :scheme=http :path=/a host=b", nil},
		{":method=CONNECT :authority=a:1", nil},
		{":method=CONNECT :protocol=websocket :scheme=http :path=/ :authority=a", nil},
		{get + "content-length=5", nil},
		{get + "content-length=5 content-length=5", nil},
		{get + "content-length=5,5", nil},
		{get + "content-length=5,_5 content-length=5", nil},
		{get + "host=b", nil},
		{":method=GET :scheme=http :path=/ :authority=[2001:db8::1]:80", nil},
		{":method=GET :scheme=http :path=/ :authority=a.-~%2Ftmp:8080", nil},
		{":method=GET :scheme=http :path=/ host=", nil},
		{get + "host=B", nil},
		{get + "host=b:80", nil},
		{":method=GET :scheme=http :path=/a :authority=b:80 host=b", nil},
		{":method=GET :scheme=https :path=/a :authority=b host=b:443", nil},
		{":method=CONNECT :authority=a:1 host=a:1", nil},
		{get + "a=_blanks_around_", nil},
		{get + "priority=u=1", nil},

		{"", ErrMessage},
		{"a=b", ErrMessage},
		{get + ":path=/", ErrMessage},
		{get + "a=b :path=/", ErrMessage},
		{get + ":status=200", ErrMessage},
		{":method=GET :scheme=http :authority=b", ErrMessage},
		{":method=GET :scheme=http :path= :authority=b", ErrMessage},
		{":method=GET :scheme=http :path=/_HTTP/1.1 :authority=b", ErrMessage},
		{":method=(GET) :scheme=http :path=/ :authority=b", ErrMessage},
		{":method=CONNECT", ErrMessage},
		{":method=CONNECT :authority=a:1 :path=/", ErrMessage},
		{":method=CONNECT :protocol=websocket :scheme=http :path=/", ErrMessage},
		{":method=GET :protocol=websocket :scheme=http :path=/ :authority=a", ErrMessage},
		{get + "connection=close", ErrMessage},
		{get + "proxy-connection=x", ErrMessage},
		{get + "keep-alive=x", ErrMessage},
		{get + "transfer-encoding=chunked", ErrMessage},
		{get + "upgrade=x", ErrMessage},
		{get + "te=gzip", ErrMessage},
		{get + "te=trailers,gzip", ErrMessage},
		{get + "content-length=", ErrMessage},
		{get + "content-length=+5", ErrMessage},
		{get + "content-length=-5", ErrMessage},
		{get + "content-length=5,", ErrMessage},
		{get + "content-length=,5", ErrMessage},
		{get + "content-length=5,6", ErrMessage},
		{get + "content-length=5,05", ErrMessage},
		{get + "content-length=5 content-length=5,6", ErrMessage},
		{get + "host=c", ErrMessage},
		{":method=GET :scheme=http :path=/ host=a/b", ErrMessage},
		{":method=GET :scheme=http :path=/ host=u@a", ErrMessage},
		{":method=GET :scheme=http :path=/ :authority=u@a", ErrMessage},
		{":method=GET :scheme=http :path=/ :authority=a/b", ErrMessage},
		{":method=GET :scheme=http :path=/ :authority=ä", ErrMessage},
		{":method=CONNECT :authority=a/b:1", ErrMessage},
		{get + "host=", ErrMessage},
		{get + "host=b:8080", ErrMessage},
		{get + "host=b:443", ErrMessage},
		{get + "host=b host=b", ErrMessage},
		{":method=GET :scheme=http :path=/a host=b host=b", ErrMessage},
		{":method=CONNECT :authority=a:1 host=a", ErrMessage},
		{get + "content-length=_5", ErrMessage},
		{get + "content-length=99999999999999999999", ErrMessage},
		{get + "content-length=5 content-length=6", ErrMessage},
		{get + "Host=b", ErrField},
		{get + "a:b=c", ErrField},
		{get + "ä=c", ErrField},
		{get + "=c", ErrField},
	} {
		_, err := ParseRequest(list(c.fields))
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.fields, err, c.want)
		}
	}
	for _, value := range []string{"a\rb", "a\nb", "a\x00b"} {
		if _, err := ParseRequest(append(list(get), Field{Name: "a", Value: value})); !errors.Is(err, ErrField) {
			t.Errorf("%q: %v", value, err)
		}
	}
	if _, err := ParseRequest([]Field{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/\r\n"}}); !errors.Is(err, ErrMessage) {
		t.Errorf("a path with a line break: %v", err)
	}
	r, err := ParseRequest(list(":method=CONNECT :protocol=websocket :scheme=http :path=/a :authority=b content-length=7"))
	if want := (Request{"CONNECT", "http", "b", "/a", "websocket", 7, false}); r != want || err != nil || !r.Tunnel() {
		t.Errorf("%+v and %v, want %+v", r, err, want)
	}
}

func TestResponses(t *testing.T) {
	for _, c := range []struct {
		fields string
		status int // 0: malformed
		length int64
	}{
		{":status=200", 200, -1},
		{":status=100", 100, -1},
		{":status=999 content-length=5", 999, 5},
		{":status=200 content-length=5,5", 200, 5},
		{":status=200 content-length=5 content-length=6", 0, 0},
		{":status=200 content-length=5,6", 0, 0},
		{"", 0, 0},
		{"a=b", 0, 0},
		{":status=", 0, 0},
		{":status=20", 0, 0},
		{":status=2000", 0, 0},
		{":status=+20", 0, 0},
		{":status=099", 0, 0},
		{":status=101", 0, 0},
		{"a=b :status=200", 0, 0},
		{":status=200 :status=200", 0, 0},
		{":status=200 :path=/", 0, 0},
		{":status=200 connection=close", 0, 0},
		{":status=200 Server=x", 0, 0},
	} {
		r, err := ParseResponse(list(c.fields))
		if (err == nil) != (c.status != 0) || err == nil && (r.Status != c.status || r.ContentLength != c.length || r.Interim() != (c.status < 200)) {
			t.Errorf("%s: %+v, %v", c.fields, r, err)
		}
	}
	for fields, good := range map[string]bool{
		"a=b": true, "": true, ":status=200": false, "A=b": false,
		"connection=x": false, "proxy-connection=x": false, "keep-alive=x": false, "transfer-encoding=chunked": false, "upgrade=x": false,
		"te=trailers": false, "trailer=x": true, "expect=100-continue": false, "http2-settings=x": false, "host=a": false,
		"content-length=5": false, "a=b content-length=5": false, "grpc-status=0 grpc-message=x": true,
	} {
		if err := CheckTrailers(list(fields)); (err == nil) != good {
			t.Errorf("trailers %s: %v", fields, err)
		}
	}
}

func TestARepeatedLengthBecomesASingleOne(t *testing.T) {
	for fields, want := range map[string]string{
		"a=b content-length=5 content-length=5 c=d": "a=b content-length=5 c=d",
		"content-length=5_,5,_5":                    "content-length=5",
		"content-length=5,5 content-length=5":       "content-length=5",
	} {
		all := append(list(get), list(fields)...)
		r, err := ParseRequest(all)
		if err != nil || r.ContentLength != 5 || !r.RepeatedLength {
			t.Errorf("%s: %+v, %v", fields, r, err)
		}
		if got, want := SingleLength(all), append(list(get), list(want)...); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", fields, got, want)
		}
	}
	if r, _ := ParseResponse(list(":status=200 content-length=5")); r.RepeatedLength {
		t.Error("a single length counts as repeated")
	}
}

func TestAnErrorNamesItsRuleAndField(t *testing.T) {
	_, err := ParseRequest(list(get + "host=c"))
	var rule Rule
	if !errors.As(err, &rule) || rule != HostDiffers || err.Error() != `HTTP/2: malformed message: a host other than :authority: "host"` {
		t.Errorf("%v, %v", rule, err)
	}
	var e *Error
	if err := MessageError(7, err); !errors.As(err, &e) || e.Stream != 7 || e.Code != ProtocolError || e.Rule != HostDiffers {
		t.Errorf("%+v", e)
	}
	_, err = ParseRequest(append(list(get), Field{Name: strings.Repeat("X", 1000)}))
	if err == nil || len(err.Error()) > 200 {
		t.Errorf("a long name is repeated whole: %v", err)
	}
	for _, r := range Rules() {
		if r.Name() == "" || r.Text() == "" || errors.Is(r, ErrField) == errors.Is(r, ErrMessage) {
			t.Errorf("rule %d has no name, no text or not one kind", r)
		}
	}
}
