import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RejectionCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECTION_CODE_UNSPECIFIED: _ClassVar[RejectionCode]
    REJECTION_CODE_INVALID: _ClassVar[RejectionCode]
    REJECTION_CODE_UNKNOWN_SKU: _ClassVar[RejectionCode]
    REJECTION_CODE_TOTAL_MISMATCH: _ClassVar[RejectionCode]
    REJECTION_CODE_OUT_OF_STOCK: _ClassVar[RejectionCode]
    REJECTION_CODE_PAYMENT_DECLINED: _ClassVar[RejectionCode]

class ReturnedStock(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RETURNED_STOCK_UNSPECIFIED: _ClassVar[ReturnedStock]
    RETURNED_STOCK_BACK: _ClassVar[ReturnedStock]
    RETURNED_STOCK_WRITTEN_OFF: _ClassVar[ReturnedStock]
REJECTION_CODE_UNSPECIFIED: RejectionCode
REJECTION_CODE_INVALID: RejectionCode
REJECTION_CODE_UNKNOWN_SKU: RejectionCode
REJECTION_CODE_TOTAL_MISMATCH: RejectionCode
REJECTION_CODE_OUT_OF_STOCK: RejectionCode
REJECTION_CODE_PAYMENT_DECLINED: RejectionCode
RETURNED_STOCK_UNSPECIFIED: ReturnedStock
RETURNED_STOCK_BACK: ReturnedStock
RETURNED_STOCK_WRITTEN_OFF: ReturnedStock

class OrderItem(_message.Message):
    __slots__ = ("sku", "quantity", "unit_price_minor", "name")
    SKU_FIELD_NUMBER: _ClassVar[int]
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    UNIT_PRICE_MINOR_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    sku: str
    quantity: int
    unit_price_minor: int
    name: str
    def __init__(self, sku: _Optional[str] = ..., quantity: _Optional[int] = ..., unit_price_minor: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class OrderCreated(_message.Message):
    __slots__ = ("order_id", "customer_id", "items", "total_amount", "total_minor", "currency", "created_at", "payment_token")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_AMOUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    PAYMENT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    customer_id: str
    items: _containers.RepeatedCompositeFieldContainer[OrderItem]
    total_amount: float
    total_minor: int
    currency: str
    created_at: _timestamp_pb2.Timestamp
    payment_token: str
    def __init__(self, order_id: _Optional[str] = ..., customer_id: _Optional[str] = ..., items: _Optional[_Iterable[_Union[OrderItem, _Mapping]]] = ..., total_amount: _Optional[float] = ..., total_minor: _Optional[int] = ..., currency: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., payment_token: _Optional[str] = ...) -> None: ...

class OfferedItem(_message.Message):
    __slots__ = ("sku", "name", "ordered", "quantity", "unit_price_minor")
    SKU_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    UNIT_PRICE_MINOR_FIELD_NUMBER: _ClassVar[int]
    sku: str
    name: str
    ordered: int
    quantity: int
    unit_price_minor: int
    def __init__(self, sku: _Optional[str] = ..., name: _Optional[str] = ..., ordered: _Optional[int] = ..., quantity: _Optional[int] = ..., unit_price_minor: _Optional[int] = ...) -> None: ...

class OrderOffered(_message.Message):
    __slots__ = ("order_id", "items", "total_minor", "currency", "expires_at", "offered_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    OFFERED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    items: _containers.RepeatedCompositeFieldContainer[OfferedItem]
    total_minor: int
    currency: str
    expires_at: _timestamp_pb2.Timestamp
    offered_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., items: _Optional[_Iterable[_Union[OfferedItem, _Mapping]]] = ..., total_minor: _Optional[int] = ..., currency: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., offered_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderOfferAccepted(_message.Message):
    __slots__ = ("order_id", "by", "total_minor", "currency", "offer_accepted_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    OFFER_ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    by: str
    total_minor: int
    currency: str
    offer_accepted_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., by: _Optional[str] = ..., total_minor: _Optional[int] = ..., currency: _Optional[str] = ..., offer_accepted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderReserved(_message.Message):
    __slots__ = ("order_id", "customer_id", "items", "total_minor", "currency", "reserved_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    RESERVED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    customer_id: str
    items: _containers.RepeatedCompositeFieldContainer[OrderItem]
    total_minor: int
    currency: str
    reserved_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., customer_id: _Optional[str] = ..., items: _Optional[_Iterable[_Union[OrderItem, _Mapping]]] = ..., total_minor: _Optional[int] = ..., currency: _Optional[str] = ..., reserved_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderRejected(_message.Message):
    __slots__ = ("order_id", "code", "reason", "rejected_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REJECTED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    code: RejectionCode
    reason: str
    rejected_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., code: _Optional[_Union[RejectionCode, str]] = ..., reason: _Optional[str] = ..., rejected_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderPaid(_message.Message):
    __slots__ = ("order_id", "charge_id", "amount_minor", "currency", "paid_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CHARGE_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    PAID_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    charge_id: str
    amount_minor: int
    currency: str
    paid_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., charge_id: _Optional[str] = ..., amount_minor: _Optional[int] = ..., currency: _Optional[str] = ..., paid_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderDeclined(_message.Message):
    __slots__ = ("order_id", "code", "reason", "declined_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DECLINED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    code: str
    reason: str
    declined_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., declined_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderConfirmed(_message.Message):
    __slots__ = ("order_id", "charge_id", "total_minor", "currency", "confirmed_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CHARGE_ID_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    charge_id: str
    total_minor: int
    currency: str
    confirmed_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., charge_id: _Optional[str] = ..., total_minor: _Optional[int] = ..., currency: _Optional[str] = ..., confirmed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderShipped(_message.Message):
    __slots__ = ("order_id", "carrier", "tracking", "shipped_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    TRACKING_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    carrier: str
    tracking: str
    shipped_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., carrier: _Optional[str] = ..., tracking: _Optional[str] = ..., shipped_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderReturnRequested(_message.Message):
    __slots__ = ("order_id", "stock", "reason", "return_requested_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    STOCK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETURN_REQUESTED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    stock: ReturnedStock
    reason: str
    return_requested_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., stock: _Optional[_Union[ReturnedStock, str]] = ..., reason: _Optional[str] = ..., return_requested_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderReturned(_message.Message):
    __slots__ = ("order_id", "stock", "reason", "returned_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    STOCK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETURNED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    stock: ReturnedStock
    reason: str
    returned_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., stock: _Optional[_Union[ReturnedStock, str]] = ..., reason: _Optional[str] = ..., returned_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderCancelRequested(_message.Message):
    __slots__ = ("order_id", "by", "reason", "cancel_requested_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CANCEL_REQUESTED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    by: str
    reason: str
    cancel_requested_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., by: _Optional[str] = ..., reason: _Optional[str] = ..., cancel_requested_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderCancelled(_message.Message):
    __slots__ = ("order_id", "reason", "cancelled_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    reason: str
    cancelled_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., reason: _Optional[str] = ..., cancelled_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderRefundRequested(_message.Message):
    __slots__ = ("order_id", "refund", "amount_minor", "currency", "reason", "refund_requested_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    REFUND_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REFUND_REQUESTED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    refund: str
    amount_minor: int
    currency: str
    reason: str
    refund_requested_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., refund: _Optional[str] = ..., amount_minor: _Optional[int] = ..., currency: _Optional[str] = ..., reason: _Optional[str] = ..., refund_requested_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderRefunded(_message.Message):
    __slots__ = ("order_id", "refund", "refund_id", "amount_minor", "currency", "refunded_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    REFUND_FIELD_NUMBER: _ClassVar[int]
    REFUND_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    REFUNDED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    refund: str
    refund_id: str
    amount_minor: int
    currency: str
    refunded_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., refund: _Optional[str] = ..., refund_id: _Optional[str] = ..., amount_minor: _Optional[int] = ..., currency: _Optional[str] = ..., refunded_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderChargedBack(_message.Message):
    __slots__ = ("order_id", "chargeback_id", "amount_minor", "currency", "reason", "charged_back_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    CHARGEBACK_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_MINOR_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHARGED_BACK_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    chargeback_id: str
    amount_minor: int
    currency: str
    reason: str
    charged_back_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., chargeback_id: _Optional[str] = ..., amount_minor: _Optional[int] = ..., currency: _Optional[str] = ..., reason: _Optional[str] = ..., charged_back_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class OrderFailed(_message.Message):
    __slots__ = ("order_id", "step", "error", "message_id", "failed_at")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    FAILED_AT_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    step: str
    error: str
    message_id: str
    failed_at: _timestamp_pb2.Timestamp
    def __init__(self, order_id: _Optional[str] = ..., step: _Optional[str] = ..., error: _Optional[str] = ..., message_id: _Optional[str] = ..., failed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
