package controlplane

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/extauthz"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// decider is a server of external authorization.
type decider struct {
	auth.UnimplementedAuthorizationServer
	asked chan *auth.CheckRequest
	reply *auth.CheckResponse
}

func (d *decider) Check(_ context.Context, r *auth.CheckRequest) (*auth.CheckResponse, error) {
	d.asked <- r
	return d.reply, nil
}

// decide starts a server of grpc-go, and returns what asks it by the cluster c.
func decide(t *testing.T) (*decider, *callout.Client) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &decider{asked: make(chan *auth.CheckRequest, 1)}
	server, served := grpc.NewServer(), make(chan struct{})
	auth.RegisterAuthorizationServer(server, d)
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Stop(); <-served })
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetCluster("c", &mesh.Cluster{
		Name: "c", Discovery: mesh.Static, ConnectTimeout: time.Minute, HTTP: mesh.UpstreamHTTP{Protocol: mesh.UpstreamHTTP2},
		Breakers: mesh.Breakers{Connections: 10, Pending: 10, Requests: 10, Retries: 3},
		Hosts: &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{
			Address: listener.Addr().(*net.TCPAddr).AddrPort(), Weight: 1,
		}}}}},
	})
	snapshot, _ := edit.Snapshot()
	client := callout.New(callout.Config{Snapshot: func() *mesh.Snapshot { return snapshot }, Balancer: balance.New(balance.Config{})})
	t.Cleanup(client.Close)
	return d, client
}

// A server of grpc-go reads each part of a question as the generated types have it.
func TestAServerReadsQuestions(t *testing.T) {
	d, client := decide(t)
	d.reply = &auth.CheckResponse{}
	at := time.Unix(1_700_000_000, 5)
	q := &extauthz.Question{
		Source: netip.MustParseAddrPort("192.0.2.1:40000"), Destination: netip.MustParseAddrPort("[2001:db8::1]:80"),
		SourceName: "spiffe://a/ns/b/sa/c", DestinationName: "spiffe://a/ns/b/sa/d", Certificate: "-----BEGIN%20CERTIFICATE-----%0A",
		ServerName: "shop.example", At: at, Context: []mesh.NamedValue{{Name: "k", Value: "v"}},
	}
	peer := func(ip string, port uint32, name, certificate string) *auth.AttributeContext_Peer {
		return &auth.AttributeContext_Peer{Principal: name, Certificate: certificate, Address: &core.Address{Address: &core.Address_SocketAddress{
			SocketAddress: &core.SocketAddress{Address: ip, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port}},
		}}}
	}
	want := func(certificate, session bool, r *auth.AttributeContext_HttpRequest) *auth.CheckRequest {
		a := &auth.AttributeContext{
			Source: peer("192.0.2.1", 40000, q.SourceName, ""), Destination: peer("2001:db8::1", 80, q.DestinationName, ""),
			Request:           &auth.AttributeContext_Request{Time: timestamppb.New(at), Http: r},
			ContextExtensions: map[string]string{"k": "v"},
		}
		if certificate {
			a.Source.Certificate = q.Certificate
		}
		if session {
			a.TlsSession = &auth.AttributeContext_TLSSession{Sni: "shop.example"}
		}
		return &auth.CheckRequest{Attributes: a}
	}
	request := func(body, raw, partial string, fields map[string]string) *auth.AttributeContext_HttpRequest {
		headers := map[string]string{":authority": "shop.example", ":method": "POST", ":path": "/p?q=1", ":scheme": "https"}
		for name, value := range fields {
			headers[name] = value
		}
		if partial != "" {
			headers["x-envoy-auth-partial-body"] = partial
		}
		r := &auth.AttributeContext_HttpRequest{
			Id: "id", Method: "POST", Path: "/p?q=1", Query: "q=1", Host: "shop.example", Scheme: "https", Protocol: "HTTP/2", Size: -1, Headers: headers, Body: body,
		}
		if raw != "" {
			r.RawBody = []byte(raw)
		}
		return r
	}
	for name, c := range map[string]struct {
		e    mesh.ExtAuthz
		r    *extauthz.Request
		want *auth.CheckRequest
	}{
		"a connection":                    {mesh.ExtAuthz{}, nil, want(false, false, nil)},
		"with its certificate":            {mesh.ExtAuthz{PeerCert: true}, nil, want(true, false, nil)},
		"with its server name":            {mesh.ExtAuthz{TLSSession: true}, nil, want(false, true, nil)},
		"a request":                       {mesh.ExtAuthz{}, &extauthz.Request{}, want(false, false, request("", "", "", nil))},
		"with a body":                     {mesh.ExtAuthz{}, &extauthz.Request{Body: []byte("a\xffb")}, want(false, false, request("a!b", "", "false", nil))},
		"with a part of its body":         {mesh.ExtAuthz{}, &extauthz.Request{Body: []byte("a"), Partial: true}, want(false, false, request("a", "", "true", nil))},
		"with a body of bytes":            {mesh.ExtAuthz{}, &extauthz.Request{Body: []byte("a\xffb"), Raw: true}, want(false, false, request("", "a\xffb", "false", nil))},
		"with repeated fields":            {mesh.ExtAuthz{}, &extauthz.Request{Fields: []route.Field{{Name: "X-A", Value: "1"}, {Name: "x-a", Value: "2"}}}, want(false, false, request("", "", "", map[string]string{"x-a": "1,2"}))},
		"with all that a server may see ": {mesh.ExtAuthz{PeerCert: true, TLSSession: true}, &extauthz.Request{}, want(true, true, request("", "", "", nil))},
	} {
		c.e.GRPC = &mesh.GRPCService{Cluster: "c", Timeout: time.Minute}
		asked := *q
		if r := c.r; r != nil {
			r.ID, r.Method, r.Scheme, r.Host, r.Path, r.Protocol, r.Size = "id", "POST", "https", "shop.example", "/p?q=1", "HTTP/2", -1
			asked.Request = r
		}
		if a := extauthz.Ask(t.Context(), client, &c.e, &asked); a.Err != nil || a.Denied {
			t.Errorf("%s: %+v", name, a)
			continue
		}
		if got := <-d.asked; !proto.Equal(got, c.want) {
			t.Errorf("%s: the server reads\n%v\nwant\n%v", name, got, c.want)
		}
	}
}

// The answer of a server of grpc-go is read as the generated types have it.
func TestAnswersOfAServerAreRead(t *testing.T) {
	d, client := decide(t)
	option := func(name string, action core.HeaderValueOption_HeaderAppendAction, appends *wrapperspb.BoolValue) *core.HeaderValueOption {
		return &core.HeaderValueOption{Header: &core.HeaderValue{Key: name, Value: "v"}, AppendAction: action, Append: appends}
	}
	metadata, err := structpb.NewStruct(map[string]any{"k": []any{"a", 1.5, true, nil, map[string]any{"b": "c"}}})
	if err != nil {
		t.Fatal(err)
	}
	ask := func() *extauthz.Answer {
		t.Helper()
		e := &mesh.ExtAuthz{StatusOnError: http.StatusServiceUnavailable, GRPC: &mesh.GRPCService{Cluster: "c", Timeout: time.Minute}}
		a := extauthz.Ask(t.Context(), client, e, &extauthz.Question{Request: &extauthz.Request{Path: "/"}})
		<-d.asked
		return a
	}
	d.reply = &auth.CheckResponse{DynamicMetadata: metadata, HttpResponse: &auth.CheckResponse_OkResponse{OkResponse: &auth.OkHttpResponse{
		Headers: []*core.HeaderValueOption{
			option("X-Set", 0, nil), option("x-add", 0, wrapperspb.Bool(true)), option("x-absent", core.HeaderValueOption_ADD_IF_ABSENT, nil),
			option("x-present", core.HeaderValueOption_OVERWRITE_IF_EXISTS, nil), option("x-not", core.HeaderValueOption_ADD_IF_ABSENT, wrapperspb.Bool(false)),
		},
		HeadersToRemove:         []string{"Authorization", ":path"},
		ResponseHeadersToAdd:    []*core.HeaderValueOption{option("set-cookie", 0, wrapperspb.Bool(true))},
		QueryParametersToSet:    []*core.QueryParameter{{Key: "a", Value: "1"}},
		QueryParametersToRemove: []string{"b"},
	}}}
	a := ask()
	if a.Denied || a.Err != nil {
		t.Fatalf("%+v", a)
	}
	var edits []string
	actions := [...]string{mesh.AppendOrAdd: "+", mesh.AddIfAbsent: "?", mesh.OverwriteOrAdd: "=", mesh.OverwriteIfPresent: "!"}
	for i := range a.Edits {
		if e := &a.Edits[i]; e.Remove {
			edits = append(edits, "-"+e.Name)
		} else {
			edits = append(edits, e.Name+actions[e.Action]+string(e.AppendValue(nil, nil)))
		}
	}
	slices.Sort(edits)
	if got := strings.Join(edits, " "); got != "-authorization x-absent?v x-add+v x-not=v x-present!v x-set=v" {
		t.Errorf("the edits are %s", got)
	}
	if got := a.Target("/p?b=2&a=0&c"); got != "/p?c&a=1" {
		t.Errorf("the path is %s", got)
	}
	if len(a.ResponseEdits) != 1 || a.ResponseEdits[0].Name != "set-cookie" || a.ResponseEdits[0].Action != mesh.AppendOrAdd {
		t.Errorf("the edits of the response are %+v", a.ResponseEdits)
	}
	if list, _ := a.Metadata["k"].([]any); len(list) != 5 || list[0] != "a" || list[1] != 1.5 || list[2] != true || list[4].(map[string]any)["b"] != "c" {
		t.Errorf("the metadata is %v", a.Metadata)
	}

	d.reply = &auth.CheckResponse{Status: &status.Status{Code: 7}, HttpResponse: &auth.CheckResponse_DeniedResponse{DeniedResponse: &auth.DeniedHttpResponse{
		Status: &typev3.HttpStatus{Code: typev3.StatusCode_Unauthorized}, Body: "log in", Headers: []*core.HeaderValueOption{option("www-authenticate", 0, nil)},
	}}}
	if a := ask(); !a.Denied || a.Err != nil || a.Reply.Status != 401 || a.Reply.Body != "log in" || len(a.Reply.Fields) != 1 || a.Reply.Fields[0].Name != "www-authenticate" {
		t.Errorf("a denial: %+v, %+v", a, a.Reply)
	}
	d.reply = &auth.CheckResponse{Status: &status.Status{Code: 13}}
	if a := ask(); !a.Denied || a.Err != nil || a.Reply.Status != 403 {
		t.Errorf("another code: %+v", a)
	}
}
