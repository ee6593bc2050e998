package http1

// Known is a field name that the proxy treats specially.
type Known uint8

// The known names. The zero value stands for every other name.
const (
	Unknown Known = iota

	// Hop-by-hop.
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

	// Routing.
	Host
	Forwarded
	Via
	XForwardedFor
	XForwardedHost
	XForwardedPort
	XForwardedProto
	XForwardedClientCert
	PeerMetadata
	PeerMetadataID
	XRealIP

	// Identity.
	Authorization
	ProxyAuthorization
	WWWAuthenticate
	ProxyAuthenticate
	Cookie
	SetCookie
	Origin

	// Correlation.
	XRequestID
	Traceparent
	Tracestate
	B3
	UpstreamServiceTime

	// Content and origin.
	ContentType
	ContentEncoding
	CacheControl
	UserAgent
	Date
	Server

	knownCount
)

// knownNames holds the names in lower case. Tests verify that it is complete and that all kinds fit the bits of
// Head.known.
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
	PeerMetadata:         "x-envoy-peer-metadata",
	PeerMetadataID:       "x-envoy-peer-metadata-id",
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

// String returns the name in lower case, empty for Unknown.
func (k Known) String() string { return knownNames[k] }

// knownOfLength groups the known names by length, because few names share one.
var knownOfLength = func() (of [32][]Known) {
	for k := Unknown + 1; k < knownCount; k++ {
		n := len(knownNames[k])
		of[n] = append(of[n], k)
	}
	return of
}()

// knownName returns the kind of a field name, ignoring case.
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
