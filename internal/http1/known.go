package http1

// Known is one of the field names that the proxy deals with.
type Known uint8

// The known names. The zero value is every other name.
const (
	Unknown Known = iota

	// For this connection only.
	Connection
	KeepAlive
	ProxyConnection
	TE
	Upgrade
	HTTP2Settings

	// Framing.
	ContentLength
	TransferEncoding
	Trailer
	Expect

	// Where it goes, and how it came.
	Host
	Forwarded
	Via
	XForwardedFor
	XForwardedHost
	XForwardedPort
	XForwardedProto
	XForwardedClientCert
	XRealIP

	// Who asks.
	Authorization
	ProxyAuthorization
	WWWAuthenticate
	ProxyAuthenticate
	Cookie
	SetCookie
	Origin

	// What belongs together.
	XRequestID
	Traceparent
	Tracestate
	B3
	UpstreamServiceTime

	// What it is.
	ContentType
	ContentEncoding
	CacheControl
	UserAgent
	Date
	Server

	knownCount
)

// knownNames are the names in small letters. Tests hold that none is missing and that all fit the bits of Head.known.
var knownNames = [knownCount]string{
	Connection:           "connection",
	KeepAlive:            "keep-alive",
	ProxyConnection:      "proxy-connection",
	TE:                   "te",
	Upgrade:              "upgrade",
	HTTP2Settings:        "http2-settings",
	ContentLength:        "content-length",
	TransferEncoding:     "transfer-encoding",
	Trailer:              "trailer",
	Expect:               "expect",
	Host:                 "host",
	Forwarded:            "forwarded",
	Via:                  "via",
	XForwardedFor:        "x-forwarded-for",
	XForwardedHost:       "x-forwarded-host",
	XForwardedPort:       "x-forwarded-port",
	XForwardedProto:      "x-forwarded-proto",
	XForwardedClientCert: "x-forwarded-client-cert",
	XRealIP:              "x-real-ip",
	Authorization:        "authorization",
	ProxyAuthorization:   "proxy-authorization",
	WWWAuthenticate:      "www-authenticate",
	ProxyAuthenticate:    "proxy-authenticate",
	Cookie:               "cookie",
	SetCookie:            "set-cookie",
	Origin:               "origin",
	XRequestID:           "x-request-id",
	Traceparent:          "traceparent",
	Tracestate:           "tracestate",
	B3:                   "b3",
	UpstreamServiceTime:  "x-envoy-upstream-service-time",
	ContentType:          "content-type",
	ContentEncoding:      "content-encoding",
	CacheControl:         "cache-control",
	UserAgent:            "user-agent",
	Date:                 "date",
	Server:               "server",
}

// String is the name in small letters, empty for Unknown.
func (k Known) String() string { return knownNames[k] }

// knownOfLength are the known names by their length, as few names share one.
var knownOfLength = func() (of [32][]Known) {
	for k := Unknown + 1; k < knownCount; k++ {
		n := len(knownNames[k])
		of[n] = append(of[n], k)
	}
	return of
}()

// knownName returns which known name the token is, in any case.
func knownName(name []byte) Known {
	if len(name) >= len(knownOfLength) {
		return Unknown
	}
	for _, k := range knownOfLength[len(name)] {
		if same(name, knownNames[k]) {
			return k
		}
	}
	return Unknown
}
