// Package nft keeps the rules in an nftables table of family inet, by netlink and without the nft program.
//
// A rule is written in one way only. A rule that was read is translated to a ruleset.Rule and back to expressions; unless
// the result equals what was read, the rule is foreign. The whole table changes in one transaction: a packet meets all of
// the old rules or all of the new ones.
//
// The expressions are those of github.com/google/nftables/expr, and the comments those of its userdata. The transaction
// and the reader are ours. That module's Conn names no request in an error, and our errors name the refused rule and the
// missing kernel module. Its reader skips unknown expressions, so a rule with one more condition would look like ours.
package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// RemoveEmpty removes the unused base chains of tables, except those in keep, and each table that is then empty.
// iptables creates base chains with its first rule, leaves them behind with its last one, and creates them again when
// needed. Chains with other names, rules, references or another policy belong to others, and so does a table that
// existed before.
func RemoveEmpty(family ruleset.Family, tables []ruleset.TableName, keep []Chain) error {
	chains, err := Chains()
	if err != nil {
		return err
	}
	var failed []error
	for _, table := range tables {
		var empty []string
		inUse := false
		for _, c := range chains {
			if c.Family != family || ruleset.TableName(c.Table) != table {
				continue
			}
			kept := slices.ContainsFunc(keep, func(k Chain) bool { return k.Table == c.Table && k.Name == c.Name })
			if c.untouched && slices.Contains(ruleset.BaseChains, c.Name) && !kept {
				empty = append(empty, c.Name)
			} else {
				inUse = true
			}
		}
		if len(empty) > 0 {
			if err := remove(family, table, empty, !inUse); !errors.Is(err, unix.EBUSY) {
				failed = append(failed, err)
			}
		}
	}
	return cmp.Or(failed...)
}

// Chain is an nftables chain, as far as we read it.
type Chain struct {
	Family      ruleset.Family // zero for those of other families, such as inet
	protocol    uint8          // the family's number
	Table, Name string
	// base chains are called by the kernel. An untouched base chain has no rule and its initial policy.
	base, untouched bool
	hook            hook
}

// IsInet reports whether the chain is in a table of family inet.
func (c Chain) IsInet() bool { return c.protocol == unix.NFPROTO_INET }

// hook defines when the kernel calls a base chain and what it does with a packet that reaches the end.
type hook struct {
	kind           string // nat, filter or route
	number, policy uint32
	priority       int32
}

// Chains lists the chains of all tables by one netlink message. It changes nothing. A program would cost a process for
// each family and, in some versions, create tables.
func Chains() ([]Chain, error) {
	request := nl.NewNetlinkRequest(messageType(unix.NFT_MSG_GETCHAIN), unix.NLM_F_DUMP)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
	messages, err := kernel.Whole(func() ([][]byte, error) {
		return request.Execute(unix.NETLINK_NETFILTER, uint16(messageType(unix.NFT_MSG_NEWCHAIN)))
	})
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		return nil, fmt.Errorf("nftables: %w", kernel.ErrNoKernelSupport)
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("listing nftables chains: %w", kernel.Refused(false))
	case err != nil:
		return nil, fmt.Errorf("listing nftables chains: %w", err)
	}
	var chains []Chain
	for _, message := range messages {
		chain, err := readChain(message)
		if err != nil {
			return nil, fmt.Errorf("listing nftables chains: %w", err)
		}
		chains = append(chains, chain)
	}
	return chains, nil
}

// readChain reads an nfgenmsg header and its attributes. Numbers are in network byte order.
func readChain(message []byte) (Chain, error) {
	var chain Chain
	if len(message) < nl.SizeofNfgenmsg {
		return chain, fmt.Errorf("a message of %d bytes is too short", len(message))
	}
	chain.protocol = message[0]
	switch chain.protocol {
	case unix.NFPROTO_IPV4:
		chain.Family = ruleset.IPv4
	case unix.NFPROTO_IPV6:
		chain.Family = ruleset.IPv6
	}
	attributes, err := readAttributes(message[nl.SizeofNfgenmsg:])
	if err != nil {
		return chain, err
	}
	var users uint32
	for _, attribute := range attributes {
		switch attribute.kind {
		case unix.NFTA_CHAIN_TABLE:
			chain.Table = unix.ByteSliceToString(attribute.value)
		case unix.NFTA_CHAIN_NAME:
			chain.Name = unix.ByteSliceToString(attribute.value)
		case unix.NFTA_CHAIN_HOOK:
			chain.base = true
			if err := chain.hook.read(attribute.value); err != nil {
				return chain, err
			}
		case unix.NFTA_CHAIN_USE:
			users = bigEndian(attribute.value)
		case unix.NFTA_CHAIN_POLICY:
			chain.hook.policy = bigEndian(attribute.value)
		case unix.NFTA_CHAIN_TYPE:
			chain.hook.kind = unix.ByteSliceToString(attribute.value)
		}
	}
	chain.untouched = chain.base && users == 0 && chain.hook.policy == nfAccept
	return chain, nil
}

func (h *hook) read(message []byte) error {
	attributes, err := readAttributes(message)
	h.number = bigEndian(attributes.value(unix.NFTA_HOOK_HOOKNUM))
	h.priority = int32(bigEndian(attributes.value(unix.NFTA_HOOK_PRIORITY)))
	return err
}

// nfAccept is NF_ACCEPT of linux/netfilter.h.
const nfAccept = 1

func bigEndian(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(value)
}

// remove removes base chains of a family's table, and the table itself if table is set, in one transaction.
// NLM_F_NONREC makes the kernel refuse to remove a chain in use and then to change nothing, so a rule that another program
// adds at this moment is safe.
func remove(family ruleset.Family, name ruleset.TableName, chains []string, table bool) error {
	var removals []*nl.NetlinkRequest
	for _, chain := range chains {
		removals = append(removals, removal(unix.NFT_MSG_DELCHAIN, family,
			nl.NewRtAttr(unix.NFTA_CHAIN_TABLE, nl.ZeroTerminated(string(name))),
			nl.NewRtAttr(unix.NFTA_CHAIN_NAME, nl.ZeroTerminated(chain))))
	}
	if table {
		removals = append(removals, removal(unix.NFT_MSG_DELTABLE, family,
			nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(string(name)))))
	}
	if err := transact(removals); err != nil {
		return fmt.Errorf("removing empty chains from nftables: %w", err)
	}
	return nil
}

func removal(message int, family ruleset.Family, attributes ...*nl.RtAttr) *nl.NetlinkRequest {
	return newRequest(message, unix.NLM_F_NONREC, nfProtocol(family), attributes...)
}

func newRequest(message, flags int, protocol uint8, attributes ...*nl.RtAttr) *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(messageType(message), flags)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: protocol, Version: nl.NFNETLINK_V0})
	for _, attribute := range attributes {
		request.AddData(attribute)
	}
	return request
}

// refusal is the kernel's refusal of a transaction.
type refusal struct {
	request int // index of the first refused request, or -1 for the batch
	errno   unix.Errno
}

func (e refusal) Error() string { return e.errno.Error() }

func (e refusal) Unwrap() error { return e.errno }

// transact sends the requests as one batch: the kernel applies it whole or not at all. The netlink package sends single
// messages only.
//
// Only the last request asks for an acknowledgement: thousands would overflow the receive buffer. The kernel always
// reports a refusal, before the acknowledgement of the last request.
func transact(requests []*nl.NetlinkRequest) error {
	if len(requests) == 0 {
		return nil
	}
	requests[len(requests)-1].Flags |= unix.NLM_F_ACK
	batch := bracket(unix.NFNL_MSG_BATCH_BEGIN)
	for _, request := range requests {
		batch = append(batch, request.Serialize()...)
	}
	batch = append(batch, bracket(unix.NFNL_MSG_BATCH_END)...)

	socket, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := socket.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
		return err
	}
	if err := makeRoom(socket.GetFd(), len(batch)); err != nil {
		return err
	}
	if err := unix.Sendto(socket.GetFd(), batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		messages, _, err := socket.Receive()
		if err != nil {
			return err
		}
		for _, message := range messages {
			// An answer has the error and the header of the request.
			if message.Header.Type != unix.NLMSG_ERROR || len(message.Data) < 4+unix.SizeofNlMsghdr {
				continue
			}
			errno := int32(nl.NativeEndian().Uint32(message.Data))
			if errno == 0 {
				return nil
			}
			sequence := nl.NativeEndian().Uint32(message.Data[4+8:])
			return refusal{
				request: slices.IndexFunc(requests, func(r *nl.NetlinkRequest) bool { return r.Seq == sequence }),
				errno:   unix.Errno(-errno),
			}
		}
	}
}

// makeRoom enlarges the send buffer for a transaction: one message of size bytes. SO_SNDBUFFORCE needs CAP_NET_ADMIN in the
// first user namespace, and the root of another one does not have that. SO_SNDBUF is limited by net.core.wmem_max.
func makeRoom(fd, size int) error {
	const reserved = 32 // netlink_sendmsg refuses more than the buffer less these bytes
	var room int
	for _, option := range []int{0, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF} {
		if option != 0 {
			// A refusal leaves the buffer as it is.
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size+reserved)
		}
		buffer, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
		if err != nil {
			return fmt.Errorf("reading the size of a netlink socket's send buffer: %w", err)
		}
		if room = buffer - reserved; size <= room {
			return nil
		}
	}
	return fmt.Errorf("the transaction has %d bytes, and the kernel takes %d in this user namespace: "+
		"capture with fewer networks, ports or groups, raise the sysctl net.core.wmem_max on the node, or use iptables", size, room)
}

// bracket begins or ends a batch for nftables.
func bracket(message int) []byte {
	request := nl.NewNetlinkRequest(message, 0)
	request.AddData(&nl.Nfgenmsg{
		NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0, ResId: nl.Swap16(unix.NFNL_SUBSYS_NFTABLES),
	})
	return request.Serialize()
}

// messageType returns the netfilter message type of an nftables message.
func messageType(message int) int { return unix.NFNL_SUBSYS_NFTABLES<<8 | message }
