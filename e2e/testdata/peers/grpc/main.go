// Command grpc is gRPC's own interoperability test, both sides of it: `grpc serve ADDRESS` answers, and
// `grpc call ADDRESS` makes the calls over one connection and prints "ok NAME" after each case. It ends with a code
// other than 0 at the first case that fails. `grpc call https://ADDRESS` makes them over TLS. The server's health is there too: it is serving, and so is service "up",
// while service "down" is not.
package main

import (
	"context"
	"fmt"
	"log"
	"math"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/interop"
	pb "google.golang.org/grpc/interop/grpc_testing"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: grpc serve|call ADDRESS")
	}
	switch verb, address := os.Args[1], os.Args[2]; verb {
	case "serve":
		serve(address)
	case "call":
		call(address)
	default:
		log.Fatalf("unknown word %q", verb)
	}
}

func serve(address string) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(largeMessage + 1<<10))
	pb.RegisterTestServiceServer(server, interop.NewTestServer())
	healthServer := health.NewServer() // the empty name, the server as a whole, is serving from the start
	healthServer.SetServingStatus("up", healthpb.HealthCheckResponse_SERVING)
	healthServer.SetServingStatus("down", healthpb.HealthCheckResponse_NOT_SERVING)
	healthpb.RegisterHealthServer(server, healthServer)
	log.Fatal(server.Serve(listener))
}

// cases are the kinds of calls, cancellation, deadlines, metadata, trailers and statuses.
var cases = []struct {
	name string
	run  func(context.Context, pb.TestServiceClient, ...grpc.CallOption)
}{
	{"empty unary", interop.DoEmptyUnaryCall},
	{"large unary", interop.DoLargeUnaryCall},
	{"client streaming", interop.DoClientStreaming},
	{"server streaming", interop.DoServerStreaming},
	{"ping-pong", interop.DoPingPong},
	{"empty stream", interop.DoEmptyStream},
	{"deadline", interop.DoTimeoutOnSleepingServer},
	{"cancel after begin", interop.DoCancelAfterBegin},
	{"cancel after first response", interop.DoCancelAfterFirstResponse},
	{"metadata and trailers", interop.DoCustomMetadata},
	{"status code and message", interop.DoStatusCodeAndMessage},
	{"special status message", interop.DoSpecialStatusMessage},
	{"large message both ways", largeUnary},
	{"slow stream", slowStream},
	{"many small calls", manyCalls},
}

func call(address string) {
	transport := insecure.NewCredentials()
	address, secured := strings.CutPrefix(address, "https://")
	if secured {
		transport = credentials.NewTLS(nil) // with the roots of SSL_CERT_FILE
	}
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(transport), grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largeMessage+1<<10)))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client := pb.NewTestServiceClient(conn)
	for _, c := range cases {
		c.run(ctx, client)
		fmt.Println("ok", c.name)
	}
	interop.DoUnimplementedMethod(ctx, conn)
	fmt.Println("ok unimplemented method")
}

// largeMessage is larger than every window and frame on the way.
const largeMessage = 8 << 20

func largeUnary(ctx context.Context, client pb.TestServiceClient, _ ...grpc.CallOption) {
	reply, err := client.UnaryCall(ctx, &pb.SimpleRequest{
		ResponseSize: largeMessage,
		Payload:      interop.ClientNewPayload(pb.PayloadType_COMPRESSABLE, largeMessage),
	})
	if err != nil {
		log.Fatalf("large message: %v", err)
	}
	if got := len(reply.GetPayload().GetBody()); got != largeMessage {
		log.Fatalf("large message: %d bytes came back, want %d", got, largeMessage)
	}
}

// manyCalls are so many that each of a few endpoints gets some of them.
func manyCalls(ctx context.Context, client pb.TestServiceClient, _ ...grpc.CallOption) {
	for range 60 {
		interop.DoEmptyUnaryCall(ctx, client)
	}
}

// slowStream asks for two messages, of which the second one comes after the test: the first must arrive without it.
func slowStream(ctx context.Context, client pb.TestServiceClient, _ ...grpc.CallOption) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.StreamingOutputCall(ctx, &pb.StreamingOutputCallRequest{ResponseParameters: []*pb.ResponseParameters{
		{Size: 10}, {Size: 10, IntervalUs: math.MaxInt32}, // 36 minutes
	}})
	if err != nil {
		log.Fatalf("slow stream: %v", err)
	}
	if _, err := stream.Recv(); err != nil {
		log.Fatalf("slow stream: %v", err)
	}
}
